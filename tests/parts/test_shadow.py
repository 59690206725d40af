"""Another tensor in a parameter's place, during each call of its layers and at no other time."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from pefttutor.parts.shadow import Shadowed, shadow, shadows, unshadow
from tests.pictures import differences, picture

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Times:
    """In the weight's place: the weight, multiplied with a parameter of its layer."""

    key: str

    def __call__(self, layer: nn.Module, key: str, weight: torch.Tensor) -> torch.Tensor:
        return weight * layer.get_parameter(self.key)


def plus_one(layer: nn.Module, key: str, weight: torch.Tensor) -> torch.Tensor:
    return weight + 1


def doubled(layer: nn.Module, key: str, weight: torch.Tensor) -> torch.Tensor:
    return weight * 2


def as_it_is(layer: nn.Module, key: str, weight: torch.Tensor) -> None:
    return None


def test_the_layer_computes_with_it_and_the_parameter_stays_where_it_is():
    layer = nn.Linear(3, 2)
    weight = layer.weight
    expected = X @ (weight + 1).T + layer.bias * 2
    shadow(layer, "weight", "a", plus_one)
    shadow(layer, "bias", "a", doubled)
    torch.testing.assert_close(layer(X), expected)
    assert layer.weight is weight
    assert "weight" not in vars(layer)
    assert set(shadows(layer)) == {"weight", "bias"}


def test_several_are_made_one_from_the_other_in_order_and_some_say_nothing():
    layer = nn.Linear(3, 2, bias=False)
    weight = layer.weight.detach().clone()
    shadow(layer, "weight", "a", plus_one)
    shadow(layer, "weight", "b", doubled)
    shadow(layer, "weight", "c", as_it_is)
    torch.testing.assert_close(layer(X), X @ ((weight + 1) * 2).T)
    unshadow(layer, "weight", "a")
    torch.testing.assert_close(layer(X), X @ (weight * 2).T)
    shadow(layer, "weight", "a", plus_one, first=True)
    torch.testing.assert_close(layer(X), X @ ((weight + 1) * 2).T)
    unshadow(layer, "weight", "a")
    shadow(layer, "weight", "a", plus_one)
    torch.testing.assert_close(layer(X), X @ (weight * 2 + 1).T)


def test_the_last_one_taken_away_takes_its_hooks_along():
    layer = nn.Linear(3, 2)
    before = picture(layer)
    for name in ("a", "b"):
        shadow(layer, "weight", name, plus_one)
    assert len(layer._forward_pre_hooks) == len(layer._forward_hooks) == 1
    unshadow(layer, "weight", "a")
    assert differences(before, picture(layer))
    unshadow(layer, "weight", "b")
    assert differences(before, picture(layer)) == []
    assert layer._forward_hooks_always_called == {}


def test_an_error_inside_the_call_leaves_no_trace():
    layer = nn.Linear(3, 2)
    shadow(layer, "weight", "a", plus_one)
    with pytest.raises(RuntimeError):
        layer(torch.ones(4, 5))
    assert "weight" not in vars(layer)


def test_hooks_that_make_a_weight_see_it_too():
    """torch's old weight_norm makes `weight` in a hook of its own, from the parameter weight_g."""
    layer = nn.Linear(3, 2)
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = nn.utils.weight_norm(layer)
    plain = layer(X) - layer.bias
    shadow(layer, "weight_g", "a", doubled)
    torch.testing.assert_close(layer(X) - layer.bias, 2 * plain)


def test_gradients_go_through_to_the_weight_and_to_what_it_is_made_of():
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    part = Shadowed(model, "0.weight", "a", Times("times"), {"times": nn.Parameter(torch.full((2, 3), 3.0))})
    model(X).sum().backward()
    upstream = X.sum(0).expand(2, 3)
    torch.testing.assert_close(model[0].weight.grad, 3 * upstream)
    torch.testing.assert_close(part.trained()[0].grad, model[0].weight * upstream)
    assert [name for name, _ in part.saved()] == ["0.times"]


def tied() -> nn.ModuleDict:
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    return model


def test_a_tied_weight_is_seen_so_by_all_its_layers_with_one_parameter():
    model = tied()
    weight = model["a"].weight.detach().clone()
    part = Shadowed(model, "a.weight", "x", Times("times"), {"times": nn.Parameter(torch.full((3, 3), 2.0))})
    for name in "ab":
        torch.testing.assert_close(model[name](X), X @ (2 * weight).T)
    assert model["a"].times is model["b"].times
    assert len(list(model.parameters())) == 2
    part.fold()
    assert model["a"].weight is model["b"].weight
    torch.testing.assert_close(model["b"](X), X @ (2 * weight).T)
    part.unfold()
    assert torch.equal(model["b"].weight, weight)
    torch.testing.assert_close(model["b"](X), X @ (2 * weight).T)


def test_folded_kept_and_removed_the_weight_holds_it_for_good():
    model = nn.Sequential(nn.Linear(3, 2))
    before, expected = picture(model), X @ (2 * model[0].weight).T + model[0].bias
    part = Shadowed(model, "0.weight", "a", Times("times"), {"times": nn.Parameter(torch.full((2, 3), 2.0))})
    part.fold()
    torch.testing.assert_close(model(X), expected)
    part.keep(model)
    part.remove()
    torch.testing.assert_close(model(X), expected)
    assert differences(before, picture(model)) == ["0.weight: bits"]


def test_switched_off_and_removed_nothing_is_left():
    model = nn.Sequential(nn.Linear(3, 2))
    before = picture(model)
    part = Shadowed(model, "0.weight", "a", Times("times"), {"times": nn.Parameter(torch.ones(2, 3))})
    for on in (False, True, False):
        part.switch(on)
    part.remove()
    assert differences(before, picture(model)) == []


def test_a_copied_layer_is_free_of_the_original():
    model = nn.Sequential(nn.Linear(3, 2))
    Shadowed(model, "0.weight", "a", Times("times"), {"times": nn.Parameter(torch.ones(2, 3))})
    twin = copy.deepcopy(model)
    twin[0].times.data.mul_(5)
    torch.testing.assert_close(twin(X), X @ (5 * twin[0].weight).T + twin[0].bias)
    torch.testing.assert_close(model(X), X @ model[0].weight.T + model[0].bias)
