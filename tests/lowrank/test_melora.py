"""MELoRA against HF PEFT's LoRA of rank n · r whose factors have the same blocks, and zeros around them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pefttutor import LoRA, MELoRA, attached, trainable
from tests.lowrank.peers import EXACT, drawn, lora_config, run, with_peft
from tests.memory.models import assert_estimate_is_measured
from tests.pictures import differences, picture

F64, BF16 = torch.float64, torch.bfloat16


def blocks_of(matrix, like):
    """The blocks on the diagonal, and whether there is nothing else."""
    n, rows, columns = like.shape
    blocks = torch.stack(
        [matrix[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] for i in range(n)]
    )
    return blocks, torch.equal(torch.block_diag(*blocks), matrix)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("kind", "names"),
    [("llama", ("q_proj", "v_proj", "down_proj")), ("gpt2", ("c_attn",)), ("bert", ("query", "dense"))],
)
def test_outputs_and_every_gradient_are_those_of_peft_with_blocks(tiny, batch, kind, names, dropout):
    """HF PEFT's s is n · lora_alpha / (n · r). Of its gradient the blocks count: the zeros stay as they are."""
    ours = MELoRA(r=2, n=4, lora_alpha=5, target_modules=names, lora_dropout=dropout)
    as_one = LoRA(r=8, lora_alpha=20, target_modules=names, lora_dropout=dropout)
    base, inputs = tiny(kind, dtype=F64), batch(kind, side="left" if dropout else "right", dtype=F64)
    adapted = drawn(ours.attach(copy.deepcopy(base))).train(dropout > 0)
    theirs, parameters = with_peft(base, lora_config(as_one))
    own = dict(adapted.named_parameters())
    for name in trainable(adapted):
        whole = parameters[name.replace("melora", "lora")]
        whole.data.copy_(torch.block_diag(*own[name].data))
        assert blocks_of(whole.data, own[name])[1]
    torch.testing.assert_close(run(adapted, inputs), run(theirs.train(dropout > 0), inputs), **EXACT)
    for name in trainable(adapted):
        expected, _ = blocks_of(parameters[name.replace("melora", "lora")].grad, own[name])
        assert own[name].grad.abs().max() > 1e-8
        torch.testing.assert_close(own[name].grad, expected, **EXACT)
    assert sum(trainable(adapted).values()) == ours.count(base) == LoRA(r=2, target_modules=names).count(base)


def test_n_blocks_of_rank_r_have_rank_n_times_r():
    model = drawn(MELoRA(r=2, n=3, target_modules=("0",)).attach(nn.Sequential(nn.Linear(12, 9))))
    (part,) = attached(model)["default"].parts
    assert torch.linalg.matrix_rank(part.delta()) == 6
    x = torch.randn(4, 12)
    x[:, 4:] = 0  # the first share alone
    change = model(x) - torch.nn.functional.linear(x, model[0].weight, model[0].bias)
    assert change[:, :3].abs().min() > 0
    torch.testing.assert_close(change[:, 3:], torch.zeros(4, 6), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_estimate_is_what_autograd_keeps(dropout, dtype):
    method = MELoRA(r=4, target_modules=("q_proj", "down_proj"), lora_dropout=dropout)
    assert_estimate_is_measured("llama", method, dtype)


def test_what_it_refuses_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(12, 18), nn.Embedding(9, 6))
    before = picture(model)
    with pytest.raises(
        ValueError, match=r"n is 4, which doesn't divide both sizes of '0', .* one of 1, 2, 3, 6"
    ):
        MELoRA(n=4, target_modules=("0",)).attach(model)
    with pytest.raises(
        ValueError, match="r is 3, but each of n = 6 shares of '0' maps 2 to 3: r must be at most 2"
    ):
        MELoRA(r=3, n=6, target_modules=("0",)).count(model)
    with pytest.raises(ValueError, match="'1' can't be adapted: MELoRA takes no embedding"):
        MELoRA(r=2, target_modules=("1",)).attach(model)
    with pytest.raises(ValueError, match="n is 0; it must be a whole number ≥ 1"):
        MELoRA(n=0)
    assert differences(before, picture(model)) == []
