"""Finding layers by name: whole names, endings, expressions, and words for what isn't there."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from pefttutor.parts.linear import why_not_linear
from pefttutor.parts.modules import find_modules, linear_targets
from tests.tiny import tiny_model


def block() -> nn.Module:
    return nn.ModuleDict(
        {"q": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "more_q": nn.Linear(4, 2, bias=False)}
    )


def stack() -> nn.Module:
    return nn.Sequential(block(), block())


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


# ---- linear layers among them


def test_all_linear_leaves_out_the_head_and_what_trains_fully():
    model = tiny_model("llama")
    found = linear_targets(model, "all-linear", ("down_proj",))
    assert {name.rpartition(".")[2] for name in found} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
    }  # fmt: skip
    with pytest.raises(ValueError, match="'all-linear', and this model has no linear layer but its head"):
        linear_targets(nn.Sequential(nn.ReLU()), "all-linear")


def test_a_target_is_not_also_trained_fully():
    model = nn.ModuleDict({"head": nn.Sequential(nn.Linear(6, 6)), "body": nn.Linear(6, 6)})
    assert list(linear_targets(model, ("body",), ("head",))) == ["body"]
    with pytest.raises(ValueError, match=r"'head\.0' is a target and part of 'head' in modules_to_save"):
        linear_targets(model, ("head.0",), ("head",))


def test_layers_that_are_read_without_a_call_are_refused_and_taken_once_that_is_off():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    with pytest.raises(ValueError, match=r"'0\.linear1' can't be adapted: .*set_fastpath_enabled\(False\)"):
        linear_targets(model, ("linear1",))
    with pytest.raises(ValueError, match=r"'0\.linear1' can't be adapted: .*set_fastpath_enabled\(False\)"):
        linear_targets(model, "all-linear")
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert list(linear_targets(model, ("linear1",))) == ["0.linear1"]
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_what_is_usual_for_the_model_is_proposed():
    with pytest.raises(ValueError, match=r"no 'wrong'\. It has: .*Usual for it: \('query', 'value'\)"):
        linear_targets(tiny_model("bert"), ("wrong",))


def test_the_field_is_named_as_the_user_wrote_it():
    with pytest.raises(ValueError, match=r"^feedforward_modules: this model has no 'x'"):
        find_modules(stack(), ("x",), field="feedforward_modules")
