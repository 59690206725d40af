"""A layer of a wider class: several changes around it, folded into its weight and bias, and its own class back."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from pefttutor import IA3, LoRA, attached, detach, merge, switch, unmerge
from pefttutor.method import attaching
from pefttutor.parts.attachment import added_key
from pefttutor.parts.layer_change import AdaptedLayer, LayerChange
from tests.cases import answer, moved
from tests.pictures import differences, picture, tensors
from tests.tiny import tiny_batch, tiny_model

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Shift(LayerChange):
    """y = f(x) + c: the smallest change of a layer that there is."""

    def __init__(self, path: str, layer: nn.Module, name: str) -> None:
        self.key = added_key("shift", name)
        super().__init__(path, layer, name, {self.key: nn.Parameter(torch.zeros(3, dtype=torch.float64))})

    def forward(self, inner, own, x, *args, **kwargs):
        self.own = own
        return inner(x, *args, **kwargs) + self.layer.get_parameter(self.key)

    def folded_into(self, weight, bias):
        return weight, self.layer.get_parameter(
            self.key
        ) if bias is None else bias + self.layer.get_parameter(self.key)


class Shifting:
    """The method for it: what another file may look like."""

    def attach(self, model: nn.Module, *, name: str = "default") -> nn.Module:
        with attaching(model, self, name) as new:
            new.add(Shift("0", model[0], name))
        return model


def layer(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3, bias=bias, dtype=torch.float64)).eval()


LORA, SCALES = (
    LoRA(r=2, lora_alpha=4, target_modules=("0",)),
    IA3(target_modules=("0",), feedforward_modules=()),
)


# ---- the wider class


def test_the_layer_is_the_same_object_of_a_class_that_is_also_its_own():
    model = layer()
    linear, weight = model[0], model[0].weight
    Shifting().attach(model)
    assert model[0] is linear
    assert linear.weight is weight
    assert isinstance(linear, AdaptedLayer)
    assert isinstance(linear, nn.Linear)
    assert type(linear).__name__ == "AdaptedLinear"
    other = Shifting().attach(layer())
    assert type(other[0]) is type(linear)  # one class for all layers of a kind
    detach(model)
    assert type(linear) is nn.Linear


def test_its_repr_says_what_was_changed_and_whether_it_is_folded():
    model = SCALES.attach(LORA.attach(layer(), name="low"), name="high")
    assert (
        "in_features=4, out_features=3, bias=True, low: r=2, scaling=2, merged=False, high: scales"
        in repr(model)
    )
    assert "low: r=2, scaling=2, merged=True" in repr(merge(switch(model, "low")))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
def test_a_copy_is_of_the_wider_class_too_and_its_changes_are_its_own(duplicate):
    model = moved(SCALES.attach(LORA.attach(layer(), name="low"), name="high"))
    twin = duplicate(model)
    assert type(twin[0]) is type(model[0])
    assert all(part.layer is twin[0] for a in attached(twin).values() for part in a.parts)
    expected = model(X)
    assert torch.equal(twin(X), expected)
    assert torch.equal(detach(twin)(X), layer()(X))
    assert torch.equal(model(X), expected)


# ---- what is computed


def test_each_change_is_around_those_before_it_and_only_the_first_sees_the_layers_own_formula():
    model = layer()
    for name in ("one", "two"):
        Shifting().attach(model, name=name)
    moved(model)
    shifts = [model[0].get_parameter(f"shift@{name}") for name in ("one", "two")]
    torch.testing.assert_close(model(X), layer()(X) + sum(shifts))
    assert [part.own for a in attached(model).values() for part in a.parts] == [True, False]
    switch(model, "two")
    torch.testing.assert_close(model(X), layer()(X) + shifts[1])
    assert attached(model)["two"].parts[0].own


@pytest.mark.parametrize("order", [("low", "high"), ("high", "low")], ids="then ".join)
def test_scales_around_a_low_rank_change_scale_it_too(order):
    model = layer()
    for name in order:
        {"low": LORA, "high": SCALES}[name].attach(model, name=name)
    moved(model)
    A, B, scale = (model[0].get_parameter(key) for key in ("lora_A@low", "lora_B@low", "ia3_l@high"))
    own, low_rank = layer()(X), 2 * X @ A.T @ B.T
    expected = scale * (own + low_rank) if order[0] == "low" else scale * own + low_rank
    torch.testing.assert_close(model(X), expected)
    weight = model[0].weight
    torch.testing.assert_close(merge(model)(X), expected)
    assert weight is not model[0].weight
    assert torch.equal(unmerge(model)[0].weight, layer()[0].weight)
    assert model[0].weight is weight


def test_several_that_are_added_are_folded_together_and_the_very_weight_comes_back():
    model = layer()
    for name, r in (("one", 1), ("two", 3)):
        LoRA(r=r, target_modules=("0",)).attach(model, name=name)
    moved(model)
    expected, weight = model(X), model[0].weight
    for names in (("one",), ("two",), ("two", "one")):
        torch.testing.assert_close(merge(model, *names)(X), expected)
        assert model[0].weight is not weight
        assert torch.equal(unmerge(model)[0].weight, layer()[0].weight)
        assert model[0].weight is weight


# ---- folding


def test_a_bias_that_a_layer_did_not_have_is_folded_in_and_goes_again():
    model = moved(Shifting().attach(layer(bias=False)))
    expected, before = model(X), picture(model)
    merge(model)
    torch.testing.assert_close(F.linear(X, model[0].weight, model[0].bias), expected)
    torch.testing.assert_close(model(X), expected)
    unmerge(model)
    assert differences(before, picture(model)) == []


def test_it_is_rounded_once_and_computed_in_float32():
    model = nn.Sequential(nn.Linear(64, 48, dtype=torch.bfloat16))
    weight, bias = model[0].weight.float(), model[0].bias.float()
    scale = moved(IA3(target_modules=("0",), feedforward_modules=()).attach(model))[0].ia3_l
    merge(model)
    assert torch.equal(model[0].weight, (weight * scale[:, None]).bfloat16())
    assert torch.equal(model[0].bias, (bias * scale).bfloat16())


@pytest.mark.parametrize("named", ["weight", "bias"])
def test_training_while_it_is_folded_is_refused(named):
    model = merge(LORA.attach(layer())).train()
    with pytest.raises(
        RuntimeError, match="this model is merged, so lora_A and lora_B would learn nothing: unmerge it"
    ):
        model(X)
    with torch.no_grad():
        model(X)
    assert getattr(model.eval()[0], named) is not None
    model(X)


def test_a_folded_layer_is_moved_and_unfolded_in_the_new_dtype():
    model = moved(SCALES.attach(layer()))
    expected = model(X)
    merge(model).float()
    torch.testing.assert_close(model(X.float()), expected.float())
    unmerge(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(detach(model)(X.float()), layer()(X).float())


# ---- tied layers


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_kept_in_a_tied_layer_the_other_goes_on_with_the_weight_of_before(target, tmp_path):
    model, inputs = tiny_model("llama", tie_word_embeddings=True), tiny_batch("llama")
    base = model.lm_head.weight.detach().clone()
    moved(LoRA(r=3, target_modules=(target,)).attach(model))
    expected = answer(model, inputs)
    detach(model, keep=True)
    torch.testing.assert_close(answer(model, inputs), expected, rtol=1e-4, atol=1e-5)
    changed, other = model.model.embed_tokens.weight, model.lm_head.weight
    if target == "lm_head":
        changed, other = other, changed
    assert torch.equal(other, base)
    assert not torch.equal(changed, base)
    assert not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(answer(again, inputs), answer(model, inputs))
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == []


def test_two_layers_that_share_a_weight_and_are_both_changed_are_folded_each_for_itself():
    model, inputs = tiny_model("llama", tie_word_embeddings=True), tiny_batch("llama")
    base = tensors(model)
    moved(LoRA(r=3, target_modules=("embed_tokens", "lm_head")).attach(model))
    expected, before = answer(model, inputs), picture(model)
    merge(model)
    torch.testing.assert_close(answer(model, inputs), expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    unmerge(model)
    assert differences(before, picture(model)) == []
    kept = detach(copy.deepcopy(model), keep=True)
    torch.testing.assert_close(answer(kept, inputs), expected, rtol=1e-4, atol=1e-5)
    assert differences(base, tensors(detach(model))) == []
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_layer_in_two_places_is_changed_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoRA(r=2, target_modules=("a", "b.0")).attach(model)
    assert len(attached(model)["default"].parts) == 1
    assert type(detach(model)["b"][0]) is nn.Linear
