"""MoRA against the dense matrix, made of its blocks M · R(i); its rank; and a published width."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pefttutor import MoRA, attached, trainable
from pefttutor.parts.linear import dense_weight, sizes
from tests.formulas import mora
from tests.lowrank.peers import drawn, run
from tests.memory.models import assert_estimate_is_measured
from tests.pictures import differences, picture

F64, BF16 = torch.float64, torch.bfloat16


@pytest.mark.parametrize("mora_type", [1, 6])
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama", ("q_proj", "v_proj", "down_proj")),
        ("gpt2", ("c_attn",)),
        ("bert", ("query", "output.dense")),
    ],
)
def test_outputs_and_every_gradient_are_those_of_the_dense_matrix(tiny, batch, kind, names, mora_type):
    """Of layers that widen, narrow and keep their size, none of which r̂ divides."""
    ours = MoRA(r=2, mora_type=mora_type, target_modules=names)
    base, inputs = tiny(kind, dtype=F64), batch(kind, side="left", dtype=F64)
    adapted, dense = drawn(ours.attach(copy.deepcopy(base))), copy.deepcopy(base)
    leaves, handles = {}, []
    for part in attached(adapted)["default"].parts:
        layer = dense.get_submodule(part.path)
        leaves[f"{part.path}.mora_M"] = M = part.trained()[0].detach().clone().requires_grad_()

        def changed(layer, args, y, M=M):
            return y + args[0] @ mora({"mora_M": M}, *sizes(layer), ours, dense).T

        handles.append(layer.register_forward_hook(changed))
    torch.testing.assert_close(run(adapted, inputs), run(dense, inputs), rtol=1e-9, atol=1e-11)
    assert set(trainable(adapted)) == set(leaves)
    for name, leaf in leaves.items():
        assert leaf.grad.abs().max() > 1e-8
        torch.testing.assert_close(adapted.get_parameter(name).grad, leaf.grad, rtol=1e-9, atol=1e-11)
    assert sum(trainable(adapted).values()) == ours.count(base)


def test_type_1_has_rank_r_hat_and_type_6_the_full_rank():
    for mora_type, rank in ((1, 16), (6, 60)):
        layer = nn.Linear(68, 60).double()
        before = dense_weight(layer).clone()
        model = drawn(MoRA(r=2, mora_type=mora_type, target_modules=("0",)).attach(nn.Sequential(layer)))
        delta = attached(model)["default"].parts[0].delta()
        assert model[0].mora_M.shape == (16, 16)  # √(128 · 2)
        assert torch.linalg.matrix_rank(delta) == rank
        x = torch.randn(3, 68, dtype=F64)
        torch.testing.assert_close(model(x), x @ (before + delta).T + layer.bias)


def test_the_papers_width():
    """A rank of 256 where LoRA has 8, for 4096 · 4096."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 4096))
    assert MoRA(r=8, target_modules=("0",)).count(model) == 256**2 == 8 * 2 * 4096


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("mora_type", "dropout"), [(1, 0.0), (6, 0.0), (6, 0.1)])
def test_the_estimate_is_what_autograd_keeps(mora_type, dropout, dtype):
    method = MoRA(r=4, mora_type=mora_type, target_modules=("q_proj", "down_proj"), lora_dropout=dropout)
    assert_estimate_is_measured("llama", method, dtype)


def test_what_it_refuses_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(12, 18), nn.Embedding(9, 6))
    before = picture(model)
    with pytest.raises(
        ValueError, match=r"r is 6, which makes M 13 wide, but '0' maps 12 to 18, .*a smaller r"
    ):
        MoRA(r=6, mora_type=1, target_modules=("0",)).attach(model)
    with pytest.raises(ValueError, match="'1' can't be adapted: MoRA takes no embedding"):
        MoRA(r=2, target_modules=("1",)).attach(model)
    with pytest.raises(ValueError, match="mora_type is 2; it must be one of 1, 6"):
        MoRA(mora_type=2)
    assert differences(before, picture(model)) == []
