"""The parts that every method is made of, and the package's lazy names."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import pefttutor
from pefttutor.method import Method, adapted, attaching, find, freeze, trainable
from pefttutor.parts.freezing import train_fully
from pefttutor.parts.linear import why_not_linear
from pefttutor.parts.modules import find_modules


def block() -> nn.Module:
    return nn.ModuleDict(
        {"q": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "more_q": nn.Linear(4, 2, bias=False)}
    )


def stack() -> nn.Module:
    return nn.Sequential(block(), block())


@dataclasses.dataclass(frozen=True)
class BiasOnly:
    """The smallest method: what another file may look like."""

    def attach(self, model: nn.Module, *, name: str = "default") -> nn.Module:
        with attaching(model, self, name) as new:
            for part in train_fully(model, [n for n, _ in model.named_parameters() if n.endswith("bias")]):
                new.add(part)
        return model


# ---- freezing and counting ----


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


# ---- finding ----


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("q",), ["0.q", "1.q"]),
        (("1.q",), ["1.q"]),
        (("more_q", "0.q"), ["0.q", "0.more_q", "1.more_q"]),
        (["q", "q"], ["0.q", "1.q"]),
        (r"0\..*q", ["0.q", "0.more_q"]),
    ],
)
def test_finds_whole_names_endings_and_expressions_in_the_models_order(names, found):
    model = stack()
    result = find_modules(model, names, why_not_linear)
    assert list(result) == found
    assert all(model.get_submodule(name) is module for name, module in result.items())


def test_an_ending_means_whole_parts_and_no_expression():
    with pytest.raises(ValueError, match=r"this model has no '\.q'"):
        find_modules(stack(), (".q",), why_not_linear)
    with pytest.raises(ValueError, match=r"this model has no 'm\.re_q'"):
        find_modules(stack(), ("m.re_q",), why_not_linear)


def test_a_shared_layer_is_found_by_any_of_its_names_but_once():
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"first": layer, "second": layer})
    assert list(find_modules(model, ("second",), why_not_linear)) == ["second"]
    assert list(find_modules(model, ("first", "second"), why_not_linear)) == ["first"]


def test_every_name_that_finds_nothing_is_reported_with_those_that_exist():
    message = "target_modules: this model has no 'kk' and 'vv'. It has: q, more_q."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        find_modules(stack(), ("q", "kk", "vv"), why_not_linear)


def test_a_string_that_finds_nothing_explains_expressions():
    with pytest.raises(ValueError, match=r"A string is a regular expression.*for endings write \('q',\)"):
        find_modules(stack(), "q", why_not_linear)
    with pytest.raises(ValueError, match="'q\\(' is not a regular expression"):
        find_modules(stack(), "q(", why_not_linear)


def test_a_model_without_such_layers_says_so_and_a_long_list_is_cut():
    with pytest.raises(ValueError, match="It has no layer that can be adapted"):
        find_modules(nn.Sequential(nn.ReLU()), ("q",), why_not_linear)
    with pytest.raises(ValueError, match="38, 39 and 5 more"):
        find_modules(nn.Sequential(*(nn.Linear(1, 1) for _ in range(45))), ("q",), why_not_linear)


# ---- attaching ----


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


# ---- the package ----


def in_a_new_python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_importing_the_package_loads_nothing_else():
    heavy = "{'torch', 'transformers', 'datasets', 'matplotlib', 'ipywidgets'}"
    assert in_a_new_python(f"import sys, pefttutor; print(sorted({heavy} & set(sys.modules)))") == "[]"
    heavy = "{'transformers', 'datasets', 'matplotlib', 'ipywidgets'}"
    code = f"import sys, pefttutor; pefttutor.LoRA, pefttutor.save; print(sorted({heavy} & set(sys.modules)))"
    assert in_a_new_python(code) == "[]"


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({}, "PASSIVE 1000"),
        ({"OMP_WAIT_POLICY": "passive"}, "passive 1000"),
        ({"GOMP_SPINCOUNT": "7"}, "PASSIVE 7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
    ],
)
def test_idle_threads_soon_sleep_unless_someone_chose_otherwise(chosen, says):
    names = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
    code = (
        f"import os; [os.environ.pop(name, None) for name in {names}]; os.environ.update({chosen}); "
        f"import pefttutor; print(*(os.environ.get(name) for name in {names}))"
    )
    assert in_a_new_python(code) == says


def test_every_name_that_the_package_lists_exists():
    assert {"LoRA", "fit", "save", "load", "freeze", "models"} <= set(dir(pefttutor))
    for name in pefttutor._FUNCTIONS | pefttutor.methods():
        assert callable(getattr(pefttutor, name))


def test_an_unknown_name_lists_those_that_exist():
    with pytest.raises(AttributeError, match=r"pefttutor has no 'Lora'; it has .*LoRA"):
        pefttutor.Lora  # noqa: B018
    assert not hasattr(pefttutor, "__wrapped__")


def test_every_method_is_a_frozen_dataclass_that_can_be_made_without_arguments():
    for name, method in pefttutor.methods().items():
        assert method.__name__ == name
        assert isinstance(method(), Method)
        assert method.__dataclass_params__.frozen
        assert hash(method()) == hash(method())
