"""The product with few entries against torch's sparse tensors, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pefttutor.kernels.sparse_linear import sparse_linear

F64, BF16 = torch.float64, torch.bfloat16


def given(dtype=F64, n_in=7, n_out=5, k=9):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, n_in, generator=generator, dtype=dtype).requires_grad_()
    values = torch.randn(k, generator=generator, dtype=dtype).requires_grad_()
    return x, values, torch.randperm(n_in * n_out, generator=generator)[:k].int()


def dense(values, index, n_in, n_out):
    where = torch.stack([index.long() // n_in, index.long() % n_in])
    return torch.sparse_coo_tensor(where, values, (n_out, n_in), check_invariants=True).to_dense()


def test_output_and_gradients_are_those_of_a_sparse_tensor():
    x, values, index = given()
    weight = torch.randn(2, 3, 5, dtype=F64)
    ours = sparse_linear(x, values, index, 5)
    theirs = F.linear(x, dense(values, index, 7, 5))
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(
        torch.autograd.grad((ours * weight).sum(), (x, values)),
        torch.autograd.grad((theirs * weight).sum(), (x, values)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    assert torch.autograd.gradcheck(lambda x, values: sparse_linear(x, values, index, 5), (x, values))


@pytest.mark.parametrize("autocast", [True, False])
def test_values_may_be_wider_than_the_input(autocast):
    x, values, index = given(torch.float32)
    with torch.autocast("cpu", dtype=BF16, enabled=autocast):
        y = sparse_linear(x if autocast else x.to(BF16), values, index, 5)
        expected = F.linear(x.to(BF16), dense(values.to(BF16), index, 7, 5))
    assert y.dtype == BF16
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert values.grad.dtype == x.grad.dtype == torch.float32


@pytest.mark.parametrize("trains", ["x", "values", "both"])
def test_no_dense_matrix_is_kept_and_nothing_that_no_gradient_needs(trains):
    x, values, index = given()
    x, values = (t if trains in (name, "both") else t.detach() for name, t in (("x", x), ("values", values)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = sparse_linear(x, values, index, 5)
    needed = {"x": [values, index], "values": [x, index], "both": [x, values, index]}[trains]
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in needed]
    asked = [t for t in (x, values) if t.requires_grad]
    expected = torch.autograd.grad(F.linear(x, dense(values, index, 7, 5)).sum(), asked)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), asked), expected)


def test_as_many_places_as_values():
    x, values, index = given()
    with pytest.raises(ValueError, match=r"values is \(9,\) and index \(8,\), expected \(k\) and \(k\)"):
        sparse_linear(x, values, index[:-1], 5)
