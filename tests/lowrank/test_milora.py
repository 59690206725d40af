"""MiLoRA: its start against torch's decomposition, outputs and every gradient against HF PEFT's LoRA on the rest."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pefttutor import MiLoRA, PiSSA, attached
from pefttutor.parts.linear import dense_weight
from tests.lowrank.peers import assert_same_as_peft, lora_config
from tests.pictures import differences, picture

F64, BF16 = torch.float64, torch.bfloat16


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("kind", "names"),
    [("llama", ("q_proj", "down_proj")), ("gpt2", ("c_attn",)), ("bert", ("query", "dense"))],
)
def test_outputs_and_every_gradient_are_those_of_peft_on_the_rest_of_the_weight(
    tiny, batch, kind, names, dropout
):
    """HF PEFT has no such start: its plain LoRA gets W₀ − s · B₀ A₀ as the frozen weight, by torch's decomposition."""
    ours = MiLoRA(r=3, lora_alpha=7, target_modules=names, lora_dropout=dropout)
    base, inputs = tiny(kind, dtype=F64), batch(kind, side="left" if dropout else "right", dtype=F64)
    rest = copy.deepcopy(base)
    for part in attached(ours.attach(copy.deepcopy(base)))["default"].parts:
        layer = rest.get_submodule(part.path)
        U, S, Vh = torch.linalg.svd(dense_weight(layer), full_matrices=False)
        S[-3:] = 0
        principal = U @ S.diag() @ Vh
        layer.weight.data.copy_(principal.T if kind == "gpt2" else principal)
    close = {"rtol": 1e-9, "atol": 1e-11}
    assert_same_as_peft(base, ours, lora_config(ours), inputs, train=dropout > 0, theirs_on=rest, **close)


def test_it_starts_at_the_smallest_singular_values_in_equal_shares():
    layer = nn.Linear(9, 7).double()
    model = MiLoRA(r=2, lora_alpha=3, target_modules=("0",)).attach(nn.Sequential(layer))
    A, B = (p.detach() for p in attached(model)["default"].trained())
    torch.testing.assert_close(torch.linalg.svdvals(1.5 * B @ A)[:2], torch.linalg.svdvals(layer.weight)[-2:])
    torch.testing.assert_close(A @ A.T, B.T @ B)


@pytest.mark.parametrize("r", [1, 4])
def test_with_pissa_of_the_other_triplets_it_makes_up_the_weight(r):
    layer = nn.Linear(9, 7).double()
    starts = []
    for kind, rank in ((MiLoRA, r), (PiSSA, 7 - r)):
        method = kind(r=rank, lora_alpha=3, target_modules=("0",))
        (part,) = attached(method.attach(nn.Sequential(copy.deepcopy(layer))))["default"].parts
        A, B = part.start
        starts.append(method.scaling * B @ A)
    torch.testing.assert_close(sum(starts), layer.weight.detach())
    torch.testing.assert_close(starts[0].T @ starts[1], torch.zeros(9, 9, dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_it_starts_as_it_was_and_the_base_keeps_every_bit(dtype):
    model, words = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5)).to(dtype), torch.tensor([[0, 3, 6]])
    weights, start = {n: t.clone() for n, t in model.state_dict().items()}, model(words).detach()
    MiLoRA(r=2, target_modules=("0", "1")).attach(model)
    assert torch.equal(model(words), start)
    assert differences(weights, {n: t for n, t in model.state_dict().items() if n in weights}) == []


def test_what_it_refuses_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    model[1].weight.data[2:] = 0
    model[1].weight.data[:2] = torch.eye(4)[:2]
    before = picture(model)
    with pytest.raises(ValueError, match="r is 5, but '0' maps 6 to 4: r must be at most 4"):
        MiLoRA(r=5, target_modules=("0",)).attach(model)
    with pytest.raises(
        ValueError, match=r"of a weight of \(4, 4\) the singular values to start at are all zero"
    ):
        MiLoRA(r=2, target_modules=("0", "1")).attach(model)
    with pytest.raises(ValueError, match="lora_alpha is -1"):
        MiLoRA(lora_alpha=-1)
    assert differences(before, picture(model)) == []
