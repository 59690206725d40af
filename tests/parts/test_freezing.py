"""Freezing, and the base's own parameters that train as a whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pefttutor import LinearProbe, LoRA, detach, freeze, trainable
from pefttutor.method import find
from pefttutor.parts.freezing import Whole, aside, fully_trained, train_everything, train_fully, whole
from tests.pictures import differences, picture, tensors


def block() -> nn.Module:
    return nn.ModuleDict(
        {"q": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "more_q": nn.Linear(4, 2, bias=False)}
    )


def test_freezing_stops_everything_and_drops_gradients():
    model = block()
    model["q"](torch.ones(1, 4)).sum().backward()
    assert freeze(model) is model
    assert trainable(model) == {}
    assert all(p.grad is None for p in model.parameters())


def test_trainable_counts_a_shared_parameter_once():
    model = nn.ModuleDict({"a": nn.Linear(3, 5, bias=False), "b": nn.Linear(3, 5, bias=False)})
    model["b"].weight = model["a"].weight
    assert trainable(model) == {"a.weight": 15}


# ---- which of the base's own


class Fixed(nn.Module):
    """It declares its positions fixed, as Whisper its sinusoids; it has whole numbers, and buffers of both sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.norm = nn.Linear(4, 4), nn.Linear(4, 2), nn.BatchNorm1d(4)
        self.positions = nn.Parameter(torch.ones(3, 4), requires_grad=False)
        self.codes = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
        self.register_buffer("offset", torch.zeros(4))
        self.register_buffer("made_anew", torch.zeros(4), persistent=False)


EVERY = ["body.weight", "body.bias", "head.weight", "head.bias", "norm.weight", "norm.bias"]
STATISTICS = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]


def test_what_a_model_declares_fixed_and_whole_numbers_do_not_train():
    assert whole(Fixed()) == EVERY
    model = Fixed()
    model.body.requires_grad_(False)
    assert whole(model) == EVERY[2:]


def test_in_a_model_that_somebody_froze_all_of_floating_point_are_meant():
    assert set(whole(freeze(Fixed()))) == {*EVERY, "positions"}


def test_what_is_meant_stays_the_same_while_others_are_attached():
    model = LoRA(r=2, target_modules=("body",)).attach(Fixed(), name="low")
    assert whole(model) == EVERY
    assert [name for name, _ in train_everything(model).saved()] == [*EVERY, "offset", *STATISTICS]


def test_a_module_to_save_means_its_parameters_and_its_saved_buffers_each_once_in_the_models_order():
    model = nn.ModuleDict({"inner": Fixed(), "again": nn.Linear(4, 4)})
    model["again"].weight = model["inner"].body.weight
    parameters, buffers = fully_trained(model, ("again", "inner", "norm"))
    assert parameters == [f"inner.{name}" for name in ("positions", *EVERY)] + ["again.bias"]
    assert buffers == [f"inner.{name}" for name in ("offset", *STATISTICS)]
    assert fully_trained(model, ()) == ([], [])


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("head", r"modules_to_save is a string; write \('head',\)"),
        (("no",), "modules_to_save: this model has no 'no'"),
    ],
)
def test_what_names_no_module_is_refused(names, says):
    with pytest.raises(ValueError, match=says):
        fully_trained(Fixed(), names)


def test_a_head_that_carries_another_method_trains_its_own_tensors_only():
    """What "low" has added inside of the head belongs to "low", which may be taken out before."""
    model = LoRA(r=2, target_modules=("head",)).attach(Fixed(), name="low")
    LinearProbe(modules_to_save=("head",)).attach(model, name="probe")
    assert [name for name, _ in find(model, "probe").parts[0].saved()] == ["head.weight", "head.bias"]
    detach(model, "low")
    assert set(trainable(model)) == {"head.weight", "head.bias"}


# ---- a part that trains them


def test_nothing_to_train_is_no_part():
    assert train_fully(Fixed(), ()) == []
    (part,) = train_fully(Fixed(), ["head.bias", "body.bias"], ("norm",))
    assert [name for name, _ in part.saved()] == [
        "body.bias",
        "head.bias",
        "norm.weight",
        "norm.bias",
        *STATISTICS,
    ]
    assert len(part.trained()) == 4


@pytest.mark.parametrize("beside", [False, True], ids=["kept in main memory", "kept beside the weights"])
def test_switched_off_the_tensors_are_what_they_were_and_on_what_was_learned(beside):
    model = Fixed()
    before = picture(model)
    part = Whole(model, ["head.weight"], ["norm.running_mean"], beside=beside)
    start = tensors(model)
    assert ("head.weight_start" in start) is beside
    assert "head.weight_start" not in model.state_dict()
    with torch.no_grad():
        model.head.weight.add_(1)
        model.norm.running_mean.add_(2)
    learned = tensors(model)
    for _ in range(2):
        part.switch(False)
        assert differences(start, tensors(model)) == []
        part.switch(False)
        part.switch(True)
        assert differences(learned, tensors(model)) == []
        part.switch(True)
    part.check_foldable()
    part.switch(False)
    part.remove()
    assert differences(before, picture(model)) == []


def test_what_is_kept_beside_moves_with_the_model_and_is_found_by_name():
    model = Fixed()
    part = Whole(model, ["head.weight", "head.bias"], beside=True)
    model.double()
    assert {name: tensor.dtype for name, tensor in part.starts().items()} == {
        "head.weight": torch.float64,
        "head.bias": torch.float64,
    }
    assert [id(tensor) for tensor in part.added()] == [id(tensor) for tensor in part.starts().values()]
    in_memory = Whole(model, ["body.weight"])
    assert in_memory.added() == []
    assert torch.equal(in_memory.kept_aside()[0], model.body.weight)
    assert in_memory.kept_aside()[0].data_ptr() != model.body.weight.data_ptr()


def test_without_values_nothing_is_copied():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    (kept,) = aside([model.weight])
    assert kept.is_meta
    part = Whole(model, ["weight"])
    part.switch(False)
    part.switch(True)
