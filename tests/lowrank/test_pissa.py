"""PiSSA against HF PEFT: the start, outputs and every gradient; the base keeps its own weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pefttutor import LoRA, PiSSA, attached, detach, load, merge, save, trainable
from pefttutor.parts.linear import dense_weight
from pefttutor.parts.lowrank_layer import singular_factors
from pefttutor.widgets.spectrum import updates
from tests.lowrank.peers import drawn, lora_config, run, with_peft
from tests.memory.models import assert_estimate_is_measured
from tests.pictures import differences, picture

F64, BF16 = torch.float64, torch.bfloat16


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("kind", "names"),
    [("llama", ("q_proj", "down_proj")), ("gpt2", ("c_attn",)), ("bert", ("query", "dense"))],
)
def test_start_outputs_and_every_gradient_are_those_of_peft(tiny, batch, kind, names, dropout):
    """HF PEFT decomposes in float32 only, so its factors are taken over, and its residual is made again in float64."""
    ours = PiSSA(r=3, lora_alpha=7, target_modules=names, lora_dropout=dropout)
    base, inputs = tiny(kind), batch(kind, side="left" if dropout else "right", dtype=F64)
    theirs, parameters = with_peft(base, lora_config(ours, init_lora_weights="pissa"))
    adapted = ours.attach(copy.deepcopy(base))
    for part in attached(adapted)["default"].parts:
        A, B = (parameters[f"{part.path}.lora_{x}"].detach() for x in "AB")
        torch.testing.assert_close(part.factors[1] @ part.factors[0], B @ A, rtol=1e-4, atol=1e-5)
        weight = dense_weight(base.get_submodule(part.path))
        torch.testing.assert_close(torch.linalg.svdvals(B @ A)[:3], torch.linalg.svdvals(weight)[:3] * 3 / 7)
    adapted, theirs = adapted.double(), theirs.double()
    for part in attached(adapted)["default"].parts:
        weight = adapted.get_submodule(part.path).weight
        start = ours.scaling * part.start[1] @ part.start[0]
        parameters[f"{part.path}.weight"].data.copy_(weight - (start.t() if kind == "gpt2" else start))
    drawn(adapted).train(dropout > 0)
    theirs.train(dropout > 0)
    own = dict(adapted.named_parameters())
    assert set(trainable(adapted)) == {n for n, p in parameters.items() if p.requires_grad}
    for name in trainable(adapted):
        parameters[name].data.copy_(own[name].data)
    exact = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(run(adapted, inputs), run(theirs, inputs), **exact)
    for name in trainable(adapted):
        assert own[name].grad.abs().max() > 1e-8
        torch.testing.assert_close(own[name].grad, parameters[name].grad, **exact)


@pytest.mark.parametrize("dtype", [torch.float16, BF16, torch.float32, F64])
def test_the_start_is_the_best_approximation_of_its_rank(dtype):
    W = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    A, B = singular_factors(W, slice(2), 0.5)
    off = W.to(A.dtype) - 0.5 * B @ A
    S = torch.linalg.svdvals(W.to(A.dtype))
    torch.testing.assert_close(off.norm(), S[2:].norm())  # Eckart and Young
    torch.testing.assert_close(A @ A.T, B.T @ B, rtol=1e-3, atol=1e-5)  # each has half of the strength
    assert A.dtype == torch.promote_types(dtype, torch.float32)
    assert (
        A.is_contiguous()
    )  # LAPACK's own are column by column, and whoever flattens a parameter would stumble
    assert B.is_contiguous()


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("before", [False, True])
def test_it_starts_as_it_was_and_the_base_keeps_every_bit(before, dtype):
    model = nn.Sequential(nn.Linear(6, 5), nn.Embedding(7, 6)).to(dtype)
    if before:
        drawn(LoRA(r=1, target_modules=("0",)).attach(model, name="before"))
    words, names = torch.tensor([[0, 3, 6]]), [n for n in model.state_dict() if "lora" not in n]
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    start = model[0](model[1](words)).detach()
    PiSSA(r=2, target_modules=("0", "1")).attach(model, name="pissa")
    assert torch.equal(model[0](model[1](words)), start)
    drawn(model)
    assert not torch.equal(model[0](model[1](words)), start)
    assert differences({n: weights[n] for n in names}, {n: model.state_dict()[n] for n in names}) == []


def test_a_file_holds_the_start_for_another_machine_may_decompose_otherwise(tmp_path):
    base = nn.Sequential(nn.Linear(6, 5))
    model = drawn(PiSSA(r=2, target_modules=("0",)).attach(copy.deepcopy(base)))
    model[0].lora_A_start[0] *= -1  # as with another sign, in all of them
    model[0].lora_B_start[:, 0] *= -1
    save(model, tmp_path)
    again = load(copy.deepcopy(base), tmp_path)
    x = torch.randn(4, 6)
    assert torch.equal(again(x), model(x))


def test_what_was_learned_has_up_to_twice_the_rank_and_merges():
    base = nn.Sequential(nn.Linear(9, 8)).eval()
    model = drawn(PiSSA(r=2, target_modules=("0",)).attach(copy.deepcopy(base))).eval()
    assert int((updates(model)["0"].sigma > 1e-5).sum()) == 4
    x = torch.randn(4, 9)
    said = model(x).detach()
    torch.testing.assert_close(merge(model)(x), said)
    assert torch.equal(detach(model)(x), base(x))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_estimate_is_what_autograd_keeps(dropout, dtype):
    method = PiSSA(r=4, target_modules=("q_proj", "down_proj"), lora_dropout=dropout)
    estimated, _ = assert_estimate_is_measured("llama", method, dtype)
    assert estimated.adapter_weights == 2 * 4 * estimated.trained


def test_what_it_refuses_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(6, 4))
    before = picture(model)
    with pytest.raises(ValueError, match="r is 5, but '0' maps 6 to 4: r must be at most 4"):
        PiSSA(r=5, target_modules=("0",)).attach(model)
    with pytest.raises(ValueError, match="lora_alpha is -1"):
        PiSSA(lora_alpha=-1)
    assert differences(before, picture(model)) == []
