"""The low-rank change of one layer: the formula on every kind of layer, its gradients, and how its factors start."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from pefttutor.parts.linear import dense_weight
from pefttutor.parts.lowrank_layer import LowRank, draw_factors
from tests.tiny import Quantised

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def changed(layer: nn.Module, *, r: int = 2, dropout: float = 0.0) -> LowRank:
    A, B = draw_factors(layer, r, seeded())
    draws = [torch.randn(factor.shape, generator=seeded(1), dtype=F64) for factor in (A, B)]
    return LowRank("it", layer, "default", tuple(draws), scaling=0.5, dropout=dropout)


LAYERS = {
    "Linear": lambda: nn.Linear(6, 5, dtype=F64),
    "without bias": lambda: nn.Linear(6, 5, bias=False, dtype=F64),
    "Conv1D": lambda: Conv1D(5, 6).double(),
    "quantised": lambda: Quantised(nn.Linear(6, 5, dtype=F64)).double(),
    "normalised": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 5, dtype=F64)),
}


@pytest.mark.parametrize("stacked", [False, True], ids=["alone", "around another"])
@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_and_every_gradient_are_those_of_the_dense_formula(layer, stacked):
    layer = LAYERS[layer]()
    if stacked:
        LowRank("it", layer, "inner", (torch.ones(1, 6), torch.full((5, 1), 0.3)), scaling=2.0)
    part = changed(layer)
    x, y = (torch.randn(2, 3, 6, generator=seeded(2), dtype=F64).requires_grad_() for _ in range(2))
    factors = [factor.detach().clone().requires_grad_() for factor in part.factors]
    weight = dense_weight(layer).detach() + (0.6 * torch.ones(5, 6) if stacked else 0)
    expected = F.linear(y, weight + 0.5 * factors[1] @ factors[0], getattr(layer, "bias", None))
    found = layer(x)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(2, 3, 5, generator=seeded(3), dtype=F64)
    found.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, y.grad)
    for factor, other in zip(part.factors, factors, strict=True):
        torch.testing.assert_close(factor.grad, other.grad)


def test_an_embedding_adds_columns_of_a_and_leaves_its_padding_row_without_a_gradient():
    layer = nn.Embedding(7, 5, padding_idx=0, dtype=F64)
    part = changed(layer)
    A, B = part.factors
    assert (A.shape, B.shape) == ((2, 7), (5, 2))
    ids = torch.tensor([[0, 3], [6, 3]])
    found = layer(ids)
    torch.testing.assert_close(found, (layer.weight + 0.5 * (B @ A).T)[ids])
    found.sum().backward()
    assert not A.grad[:, [0, 1, 2, 4, 5]].any()
    assert A.grad[:, [3, 6]].all()


def test_delta_is_what_is_folded_in_in_the_layers_own_order():
    for layer in (nn.Linear(6, 5, dtype=F64), Conv1D(5, 6).double(), nn.Embedding(6, 5, dtype=F64)):
        part = changed(layer)
        A, B = part.factors
        torch.testing.assert_close(part.delta(), 0.5 * B @ A)
        weight = dense_weight(layer)
        torch.testing.assert_close(part.folded_into(weight, None)[0], weight + 0.5 * B @ A)
        before = layer.weight.detach().clone()
        part.fold()
        torch.testing.assert_close(dense_weight(layer), weight + 0.5 * B @ A)
        part.unfold()
        assert torch.equal(layer.weight, before)


def test_dropout_drops_the_branch_alone_and_only_in_training():
    layer = nn.Linear(400, 5, dtype=F64)
    own = layer(torch.ones(1, 400, dtype=F64)).detach()
    part = LowRank("it", layer, "d", (torch.ones(1, 400), torch.ones(5, 1)), scaling=1.0, dropout=0.25)
    x = torch.ones(1000, 400, dtype=F64)
    torch.manual_seed(0)
    added = (layer.train()(x) - own) / 400
    assert added.mean().item() == pytest.approx(1, rel=0.01)
    assert added.std().item() == pytest.approx(math.sqrt(0.25 / 0.75 / 400), rel=0.1)
    torch.testing.assert_close(layer.eval()(x) - own, torch.full((1000, 5), 400.0, dtype=F64))
    assert "r=1, scaling=1, merged=False" in part.describe()


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        (torch.float64, F64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_factors_are_at_least_float32_and_the_output_is_of_the_inputs_dtype(given, dtype):
    layer = nn.Linear(6, 5, dtype=given)
    part = LowRank("it", layer, "default", draw_factors(layer, 2, seeded()), scaling=1.0)
    assert {factor.dtype for factor in part.factors} == {dtype}
    y = layer(torch.ones(2, 6, dtype=given))
    assert y.dtype == given
    y.sum().backward()
    assert {factor.grad.dtype for factor in part.factors} == {dtype}


def test_factors_are_drawn_as_a_linear_layers_weight_and_on_the_cpu():
    A, B = draw_factors(nn.Linear(400, 300, device="meta"), 64, seeded())
    bound = 1 / math.sqrt(400)
    assert A.device.type == B.device.type == "cpu"
    assert not B.any()
    assert 0.99 * bound < A.abs().max() <= bound
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    zero, normal = draw_factors(nn.Embedding(500, 300), 64, seeded())
    assert not zero.any()
    assert normal.std().item() == pytest.approx(1, rel=0.02)
    again, _ = draw_factors(nn.Linear(400, 300), 64, seeded())
    assert torch.equal(A, again)
