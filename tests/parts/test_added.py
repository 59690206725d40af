"""Tensors that a method puts beside the base's own: under which names, what of them trains, and that they go again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pefttutor import Compacter, LoTR, VeRA
from pefttutor.parts.added import Added
from tests.pictures import differences, picture


def added(model: nn.Sequential) -> Added:
    tensors = [
        (model[0], "0", "vector", nn.Parameter(torch.ones(3))),
        (model, "", "count", torch.tensor(4)),
        (model[1], "1", "shift", nn.Parameter(torch.zeros(2))),
    ]
    return Added(tensors)


def test_parameters_train_and_buffers_are_saved_under_their_names_in_the_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    part = added(model)
    names = {name: id(tensor) for name, tensor in part.saved()}
    assert list(names) == ["0.vector", "count", "1.shift"]
    everything = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert names == {name: id(everything[name]) for name in names}
    assert part.trained() == [model[0].vector, model[1].shift]
    assert [id(tensor) for tensor in part.added()] == list(names.values())
    assert part.changed_in_place() == part.touched() == part.kept_aside() == []


def test_they_are_the_models_even_when_it_moves_to_another_dtype():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    part = added(model)
    model.double()
    assert {tensor.dtype for tensor in part.trained()} == {torch.float64}


def test_who_makes_use_of_them_can_ask_whether_they_are_on():
    part = added(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert part.on
    part.switch(False)
    assert not part.on
    part.switch(True)
    assert part.on


def test_removed_they_leave_the_model_as_it_was_and_folding_them_is_nothing():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = picture(model)
    part = added(model)
    part.check_foldable()
    part.fold()
    part.unfold()
    assert differences(before, picture(model))
    part.remove()
    assert differences(before, picture(model)) == []


@pytest.mark.parametrize(
    "method",
    [
        Compacter(bottleneck=4, n=2, target_modules=("0", "1")),
        LoTR(r=2, target_modules=("0", "1")),
        VeRA(r=2, target_modules=("0", "1")),
    ],
    ids=lambda method: type(method).__name__,
)
def test_what_layers_share_is_copied_to_the_device_of_each(method):
    """A model may lie on several devices; here the second one has no values."""
    model = method.attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    model[1].to("meta")
    assert model[0](torch.ones(3, 4)).device.type == "cpu"
    assert model[1](torch.ones(3, 4, device="meta")).shape == (3, 4)
