"""The neck: whatever has `attach` is a method, and can be asked what it has attached."""

from __future__ import annotations

import dataclasses

import pytest
from torch import nn

from pefttutor.method import Method, adapted, attaching, find, freeze
from pefttutor.parts.freezing import train_fully


def block() -> nn.Module:
    return nn.ModuleDict(
        {"q": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "more_q": nn.Linear(4, 2, bias=False)}
    )


@dataclasses.dataclass(frozen=True)
class BiasOnly:
    """The smallest method: what another file may look like."""

    def attach(self, model: nn.Module, *, name: str = "default") -> nn.Module:
        with attaching(model, self, name) as new:
            for part in train_fully(model, [n for n, _ in model.named_parameters() if n.endswith("bias")]):
                new.add(part)
        return model


def test_any_class_with_attach_is_a_method_and_can_be_attached():
    method = BiasOnly()
    assert isinstance(method, Method)
    assert not isinstance(nn.ReLU(), Method)
    model = block()
    assert adapted(model) is None
    method.attach(model)
    assert adapted(model) is adapted(nn.Sequential(model)) is method
    assert list(find(model).tensors(model)) == ["q.bias", "norm.weight", "norm.bias"][::2]


def test_what_a_method_saves_does_not_depend_on_later_freezing():
    model = BiasOnly().attach(block())
    freeze(model)
    assert set(find(model).tensors(model)) == {"q.bias", "norm.bias"}


def test_a_layer_that_was_replaced_afterwards_is_missed():
    model = BiasOnly().attach(block())
    model["q"] = nn.Linear(4, 4, bias=False)
    with pytest.raises(ValueError, match=r"this model has lost 'q\.bias'"):
        find(model).tensors(model)
