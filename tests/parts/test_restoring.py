"""What fails in the middle leaves the model as it was: structure, hooks, classes, flags and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pefttutor.parts.restoring import restored_on_error
from tests.pictures import differences, picture


class Wider(nn.Linear):
    pass


def change_everything(model: nn.Sequential) -> None:
    model[0].register_parameter("extra", nn.Parameter(torch.ones(2)))
    model[0].register_buffer("unsaved", torch.ones(2), persistent=False)
    model[0].__class__ = Wider
    del model[1]._parameters["bias"]
    model[1].note = "new"
    del model[1].old
    model[1].register_forward_pre_hook(lambda module, args: None)
    model[1].register_forward_hook(lambda module, args, output: None, always_call=True)
    model[2] = nn.Tanh()
    vars(model)["_pefttutor"] = 1
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None


def example() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU())
    model[1].old = "old"
    model[1].weight.requires_grad_(False)
    model(torch.ones(1, 2)).sum().backward()
    return model


def fail(model: nn.Module, change: Callable[[], None], error: BaseException) -> None:
    with restored_on_error(model):
        change()
        raise error


@pytest.mark.parametrize("error", [ValueError, MemoryError, KeyboardInterrupt])
def test_after_an_error_all_is_as_before_and_the_error_goes_on(error):
    model = example()
    before, gradient, third = picture(model), model[0].weight.grad, model[2]
    with pytest.raises(error, match="in the middle"):
        fail(model, lambda: change_everything(model), error("in the middle"))
    assert differences(before, picture(model)) == []
    assert model[0].weight.grad is gradient
    assert model[2] is third


def test_without_an_error_the_changes_stay():
    model = example()
    with restored_on_error(model):
        change_everything(model)
    assert type(model[0]) is Wider
    assert isinstance(model[2], nn.Tanh)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_handle_from_before_still_takes_its_hook_away():
    model, calls = example(), []
    handle = model[0].register_forward_hook(lambda module, args, output: calls.append(1))

    def change() -> None:
        handle.remove()
        model[0].register_forward_hook(lambda module, args, output: calls.append(2))

    with pytest.raises(ValueError, match="stop"):
        fail(model, change, ValueError("stop"))
    model(torch.ones(1, 2))
    assert calls == [1]
    handle.remove()
    model(torch.ones(1, 2))
    assert calls == [1]
