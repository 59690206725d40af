"""LoTR against HF PEFT's LoRA with A = R and B = L M: outputs, and every gradient by the chain rule; its counts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pefttutor import LoTR, attached, load, save, trainable
from tests.lowrank.peers import drawn, lora_config, run, with_peft
from tests.memory.models import assert_estimate_is_measured
from tests.pictures import differences, picture

F64, BF16 = torch.float64, torch.bfloat16


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("kind", "names"),
    [("llama", ("q_proj", "v_proj", "down_proj")), ("gpt2", ("c_attn",)), ("bert", ("query", "dense"))],
)
def test_outputs_and_every_gradient_are_those_of_peft(tiny, batch, kind, names, dropout):
    """What L and R get is the sum over their layers, of one size or another."""
    ours = LoTR(r=3, lora_alpha=7, target_modules=names, lora_dropout=dropout)
    base, inputs = tiny(kind, dtype=F64), batch(kind, side="left" if dropout else "right", dtype=F64)
    adapted = drawn(ours.attach(copy.deepcopy(base))).train(dropout > 0)
    theirs, parameters = with_peft(base, lora_config(ours))
    own = {n: adapted.get_parameter(n) for n in trainable(adapted)}
    expected = {n: torch.zeros_like(p) for n, p in own.items()}
    parts = [part for part in attached(adapted)["default"].parts if hasattr(part, "path")]
    pairs = {}
    for part in parts:
        B, A = (parameters[f"{part.path}.lora_{x}"] for x in "BA")
        name = f"{len(B)}x{A.shape[1]}"
        pairs[part.path] = L, R = own[f"lotr_L_{name}"], own[f"lotr_R_{name}"]
        A.data.copy_(R.data)
        B.data.copy_(L.data @ own[f"{part.path}.lotr_M"].data)
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(run(adapted, inputs), run(theirs.train(dropout > 0), inputs), **close)
    for path, (L, _) in pairs.items():
        of_B, of_A = (parameters[f"{path}.lora_{x}"].grad for x in "BA")
        M, name = own[f"{path}.lotr_M"].data, f"{len(of_B)}x{of_A.shape[1]}"
        expected[f"{path}.lotr_M"] = L.data.T @ of_B
        expected[f"lotr_L_{name}"] += of_B @ M.T
        expected[f"lotr_R_{name}"] += of_A
    for name, parameter in own.items():
        assert expected[name].abs().max() > 1e-8
        torch.testing.assert_close(parameter.grad, expected[name], **close)
    assert sum(trainable(adapted).values()) == ours.count(base)


def test_the_published_count():
    """RoBERTa-base, queries and values of all layers, r = 2: 2 · 2 · 768 + 24 · 4."""
    with torch.device("meta"):
        model = nn.ModuleList(nn.ModuleDict({n: nn.Linear(768, 768) for n in ("q", "v")}) for _ in range(12))
    assert LoTR(r=2, target_modules=("q", "v")).count(model) == 3_168


def test_at_first_the_middle_alone_gets_a_gradient():
    model = LoTR(r=2, target_modules=("0",)).attach(nn.Sequential(nn.Linear(6, 5)))
    model(torch.ones(2, 6)).square().sum().backward()
    assert model[0].lotr_M.grad.any()
    assert not model.lotr_L_5x6.grad.any()
    assert not model.lotr_R_5x6.grad.any()


def test_two_of_them_have_their_own_and_files_come_back(tmp_path):
    base, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5)), torch.randn(3, 6)
    model = copy.deepcopy(base)
    for name in ("one", "two"):
        drawn(LoTR(r=2, target_modules=("0", "1")).attach(model, name=name))
    assert {n for n, _ in model.named_parameters() if "." not in n} == {
        f"lotr_{x}_{size}@{name}" for x in "LR" for size in ("5x6", "5x5") for name in ("one", "two")
    }
    alone = drawn(LoTR(r=2, target_modules=("0", "1")).attach(copy.deepcopy(base), name="it"))
    save(alone, tmp_path)
    assert torch.equal(load(copy.deepcopy(base), tmp_path)(x), alone(x))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_estimate_is_what_autograd_keeps(dropout, dtype):
    method = LoTR(r=4, target_modules=("q_proj", "down_proj"), lora_dropout=dropout)
    assert_estimate_is_measured("llama", method, dtype)


def test_what_it_refuses_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(6, 4), nn.Embedding(9, 6))
    before = picture(model)
    with pytest.raises(ValueError, match="r is 5, but '0' maps 6 to 4: r must be at most 4"):
        LoTR(r=5, target_modules=("0",)).attach(model)
    with pytest.raises(ValueError, match="'1' can't be adapted: LoTR takes no embedding"):
        LoTR(r=2, target_modules=("1",)).attach(model)
    with pytest.raises(ValueError, match="lora_alpha is 0"):
        LoTR(lora_alpha=0)
    assert differences(before, picture(model)) == []
