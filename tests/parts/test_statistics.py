"""Running statistics: a frozen base's don't drift in any loop; those of a head that trains do, and are saved."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pefttutor import BitFit, ChildTuningF, LinearProbe, LoRA, detach, fit, load, save, switch
from pefttutor.parts.statistics import hold_statistics
from tests.pictures import differences, picture, tensors


class Net(nn.Module):
    """Normalisations with running statistics in the body and in the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6))
        self.head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)) * 3 + 2
ROWS = [{"x": x, "labels": torch.tensor(i % 2)} for i, x in enumerate(X)]


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def by_fit(model: nn.Module) -> None:
    fit(model, ROWS, steps=3, lr=0.05, loss=loss)


def by_a_loop_of_ones_own(model: nn.Module) -> None:
    step = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for _ in range(3):
        F.cross_entropy(model.train()(X), torch.arange(8) % 2).backward()
        step.step()
        step.zero_grad()
    model.eval()


trained = pytest.mark.parametrize("training", [by_fit, by_a_loop_of_ones_own])


@trained
@pytest.mark.parametrize("method", [LoRA(r=2, target_modules=("body.0",)), BitFit()], ids=["LoRA", "BitFit"])
def test_those_of_a_frozen_base_do_not_drift(training, method):
    model = method.attach(Net().eval())
    before = {name: b for name, b in tensors(model).items() if "running" in name or "tracked" in name}
    assert len(before) == 6
    training(model)
    after = tensors(model)
    assert differences(before, {name: after[name] for name in before}) == []


@trained
def test_those_of_a_head_that_trains_move_and_are_saved(training, tmp_path):
    model = LinearProbe(modules_to_save=("head",)).attach(Net().eval())
    before = tensors(model)
    training(model)
    moved = set(differences(before, tensors(model)))
    assert moved == {n for n in before if n.startswith("head.")}
    save(model, tmp_path)
    again = load(Net().eval(), tmp_path)
    assert differences(tensors(model), tensors(again)) == []
    assert torch.equal(again.eval()(X), model.eval()(X))
    detach(model)
    assert differences(tensors(Net()), tensors(model)) == []


def test_a_method_for_all_of_the_model_learns_all_of_them():
    model = ChildTuningF(p_F=1).attach(Net().eval())
    by_a_loop_of_ones_own(model)
    full = Net()
    by_a_loop_of_ones_own(full)
    assert differences(tensors(full), tensors(model)) == []


def test_a_held_one_computes_as_in_evaluation_although_the_model_trains():
    model, plain = LoRA(r=2, target_modules=("body.0",)).attach(Net()), Net().eval()
    torch.testing.assert_close(model.train()(X), plain(X))
    assert all(m.training for m in model.modules())
    assert not torch.allclose(Net().train()(X), plain(X), atol=1e-2)


def test_an_error_in_the_call_leaves_the_mode_as_it_was():
    model = LoRA(r=2, target_modules=("body.0",)).attach(Net()).train()
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        model.body[1](torch.ones(2, 3, 4, 5))
    assert model.body[1].training
    assert "_mode_outside" not in vars(model.body[1])


def test_they_follow_what_is_switched_on():
    model = LinearProbe(modules_to_save=("head",)).attach(Net().eval(), name="probe")
    LoRA(r=2, target_modules=("body.0",)).attach(model, name="low")

    def drifts() -> set[str]:
        twin = copy.deepcopy(model).train()
        before = tensors(twin)
        twin(X)
        return set(differences(before, tensors(twin)))

    head = {f"head.0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert drifts() == head
    switch(model, "low")
    assert drifts() == set()
    switch(model, "low", "probe", train=("low",))
    assert drifts() == set()
    switch(model, "low", "probe")
    assert drifts() == head


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True), nn.BatchNorm1d(3, affine=False)],
)
def test_all_kinds_are_held_once_and_let_go_without_a_trace(norm):
    model = nn.Sequential(norm, nn.LayerNorm(5), nn.BatchNorm1d(3, track_running_stats=False))
    before = picture(model)
    for _ in range(2):
        hold_statistics(model, learned=())
    assert [len(layer._forward_pre_hooks) for layer in model] == [1, 0, 0]
    model.train()(torch.randn(4, 3, 5))
    model.train()
    assert differences(before, picture(model)) == sorted(f"0: {table}" for table in HOOKED)
    hold_statistics(model, learned=(id(norm.running_mean),))
    assert differences(before, picture(model)) == []
    hold_statistics(model, learned=())
    hold_statistics(model, learned=None)
    assert differences(before, picture(model)) == []


HOOKED = ("_forward_hooks", "_forward_hooks_always_called", "_forward_pre_hooks")
