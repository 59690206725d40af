"""DoRA against HF PEFT with the same weights, and against the dense formula."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from pefttutor import IA3, DoRA, LoRA, attached, detach, merge, trainable, unmerge
from pefttutor.parts.linear import dense_weight
from pefttutor.widgets.spectrum import truncated, updates
from tests.lowrank.peers import assert_same_as_peft, drawn, lora_config, run, with_peft
from tests.memory.models import assert_estimate_is_measured
from tests.tiny import Quantised

F64, BF16 = torch.float64, torch.bfloat16


# ---- HF PEFT


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama", ("q_proj", "v_proj", "down_proj")),
        ("gpt2", ("c_attn", "c_proj")),
        ("bert", ("query", "dense")),
        ("t5", ("q", "wo")),
    ],
)
def test_outputs_and_every_gradient_are_those_of_peft(tiny, batch, kind, names, dropout):
    ours = DoRA(r=3, lora_alpha=7, target_modules=names, lora_dropout=dropout)
    side = "left" if dropout else "right"
    inputs = batch(kind, side=side, dtype=F64)
    assert_same_as_peft(
        tiny(kind, dtype=F64), ours, lora_config(ours, use_dora=True), inputs, train=dropout > 0
    )


def test_an_embedding_rslora_and_a_new_head_are_those_of_peft(tiny, batch):
    ours = DoRA(
        r=2, use_rslora=True, target_modules=("word_embeddings", "query"), modules_to_save=("classifier",)
    )
    assert_same_as_peft(
        tiny("bert", dtype=F64), ours, lora_config(ours, use_dora=True), batch("bert", dtype=F64)
    )


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_in_bfloat16_its_gradients_are_about_as_near_to_the_exact_ones_as_those_of_peft(
    tiny, batch, kind, how
):
    names = {"llama": ("q_proj", "v_proj"), "gpt2": ("c_attn",)}[kind]
    ours, inputs = DoRA(r=2, target_modules=names), batch(kind)
    base = tiny(kind, dtype=BF16)  # so that all three have the same weights
    exact = drawn(ours.attach(copy.deepcopy(base).double()))
    model = base if how == "bfloat16" else base.float()
    adapted, (theirs, parameters) = (
        ours.attach(copy.deepcopy(model)),
        with_peft(model, lora_config(ours, use_dora=True)),
    )
    errors = []
    run(exact, inputs)
    true = {n: p.grad for n, p in exact.named_parameters() if p.grad is not None}
    for one, named in ((adapted, dict(adapted.named_parameters())), (theirs, parameters)):
        for n in true:
            named[n].data.copy_(exact.get_parameter(n).data)
        with torch.autocast("cpu", dtype=BF16, enabled=how == "autocast"):
            run(one, inputs)
        off = [((named[n].grad.double() - g).norm() / g.norm()).item() for n, g in true.items()]
        errors.append(sum(off) / len(off))
    assert errors[0] < min(0.05, 2 * errors[1])


# ---- the dense formula


LAYERS = {
    "Linear": lambda: nn.Linear(6, 5),
    "without bias": lambda: nn.Linear(6, 5, bias=False),
    "Conv1D": lambda: Conv1D(5, 6),
    "quantised": lambda: Quantised(nn.Linear(6, 5)),
}
BENEATH = {
    "alone": lambda model: model,
    "after LoRA": LoRA(r=1, target_modules=("0",)).attach,
    "after IA3": IA3(target_modules=("0",), feedforward_modules=()).attach,
    "after IA3 on the input": IA3(target_modules=("0",), feedforward_modules=("0",)).attach,
}


@pytest.mark.parametrize("detach_norm", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("beneath", BENEATH)
@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_the_dense_formula_on_every_kind_of_layer(kind, beneath, dropout, detach_norm):
    """W' = m ⊙ (W + s B A) / ‖·‖ in outputs and every gradient, on what other methods have made of W before."""
    layer = LAYERS[kind]().double()
    x = torch.randn(2, 3, 6, dtype=F64, generator=torch.Generator().manual_seed(1))
    eye, zero = torch.eye(6, dtype=F64), torch.zeros(1, 6, dtype=F64)
    model = nn.Sequential(layer)
    options = {} if beneath == "alone" else {"name": "before"}
    drawn(BENEATH[beneath](model, **options)).train()
    bias = model(zero)[0].detach()
    weight = (model(eye) - bias).t().detach()
    start = model(x).detach()
    method = DoRA(r=2, lora_alpha=3, lora_dropout=dropout, detach_norm=detach_norm, target_modules=("0",))
    method.attach(model, name="dora").train()
    if not dropout and kind != "quantised":  # in float64 its magnitude is rounded to float32
        assert torch.equal(model(x), start)
    drawn(model, seed=2)
    if beneath != "alone":  # it has moved too
        weight = attached(model)["dora"].parts[0].beneath()[0].detach()
        bias = attached(model)["dora"].parts[0].beneath()[1]
        bias = None if bias is None else bias.detach()
    A, B, m = (p.detach().clone().requires_grad_() for p in attached(model)["dora"].trained())
    one, other = (x.clone().requires_grad_() for _ in range(2))
    torch.manual_seed(4)
    z = F.dropout(other, dropout)
    changed = weight + method.scaling * B @ A
    norm = changed.norm(dim=1)
    made = (m / (norm.detach() if detach_norm else norm))[:, None] * changed
    expected = F.linear(other, weight, bias) + F.linear(z, made - weight)
    torch.manual_seed(4)
    found = model(one)
    torch.testing.assert_close(found, expected)
    upstream = torch.linspace(-1, 1, found.numel(), dtype=F64).view_as(found)
    found.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(one.grad, other.grad)
    for parameter, leaf in zip(attached(model)["dora"].trained(), (A, B, m), strict=True):
        torch.testing.assert_close(parameter.grad, leaf.grad)


def test_the_norm_is_that_of_each_output_unit():
    layer = nn.Linear(6, 4)
    model = DoRA(r=2, target_modules=("0",)).attach(nn.Sequential(layer))
    torch.testing.assert_close(layer.lora_magnitude_vector, torch.linalg.norm(layer.weight, dim=1))
    assert trainable(model) == {"0.lora_A": 12, "0.lora_B": 8, "0.lora_magnitude_vector": 4}


def test_a_row_of_zeros_stays_zero_and_breaks_nothing():
    layer = nn.Linear(4, 3)
    layer.weight.data[1] = 0
    model = drawn(DoRA(r=2, target_modules=("0",)).attach(nn.Sequential(layer)))
    fresh = DoRA(r=2, target_modules=("0",)).attach(nn.Sequential(copy.deepcopy(detach(model)[0])))
    x = torch.randn(2, 4)
    assert torch.equal(fresh(x)[:, 1], layer.bias[1].expand(2))
    fresh(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in fresh.parameters() if p.requires_grad)


# ---- merging


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("other", ["after LoRA", "after IA3"])
def test_merged_together_with_what_came_before_it_computes_the_same(other, keep):
    model, x = nn.Sequential(nn.Linear(6, 5)).eval(), torch.randn(3, 6)
    base = copy.deepcopy(model)
    drawn(DoRA(r=2, target_modules=("0",)).attach(BENEATH[other](model, name="before"), name="dora"))
    said = model(x).detach()
    (dora,) = attached(model)["dora"].parts
    change = dora.delta().detach()
    before = dora.beneath()[0].detach()
    with pytest.raises(ValueError, match="share a weight and aren't simply added"):
        merge(model, "dora")
    merge(model)
    torch.testing.assert_close(dora.delta(), change)  # it still knows what it was merged into
    torch.testing.assert_close(dense_weight(model[0]), before + change)
    if keep:
        detach(model, keep=True)
    torch.testing.assert_close(model(x), said)
    if not keep:
        assert torch.equal(unmerge(model)(x), said)
        assert torch.equal(detach(model)(x), base(x))


# ---- memory, and bad input


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(("dropout", "detach_norm"), [(0.0, True), (0.1, True), (0.0, False)])
def test_the_estimate_is_what_autograd_keeps(kind, dropout, detach_norm):
    names = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn",), "bert": ("query", "output.dense")}[kind]
    method = DoRA(r=4, target_modules=names, lora_dropout=dropout, detach_norm=detach_norm)
    assert_estimate_is_measured(kind, method)


def test_what_it_refuses_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(ValueError, match="r is 5, but '0' maps 6 to 4: r must be at most 4"):
        DoRA(r=5, target_modules=("0",)).attach(model)
    with pytest.raises(ValueError, match="detach_norm is 'yes'; it must be one of True, False"):
        DoRA(detach_norm="yes")
    with pytest.raises(ValueError, match="lora_alpha is 0"):
        DoRA(lora_alpha=0)
    assert type(model[0]) is nn.Linear
    bare = nn.Sequential(Quantised(nn.Linear(6, 4)))
    bare[0].dense_weight = None
    with pytest.raises(ValueError, match="has no dense weight"):
        DoRA(r=2, target_modules=("0",)).attach(bare)
    assert type(bare[0]) is Quantised


def test_the_ranks_widget_shows_its_update_and_says_that_it_cannot_cut_it():
    model = drawn(DoRA(r=2, target_modules=("0",)).attach(nn.Sequential(nn.Linear(6, 4))))
    found = updates(model)
    (part,) = attached(model)["default"].parts
    torch.testing.assert_close(found["0"].matrix(), part.delta().double().detach())
    with (
        pytest.raises(ValueError, match="0 has no factors that could be exchanged"),
        truncated(model, found, 1),
    ):
        pass
