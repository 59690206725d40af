"""Norms of rows with a low-rank change: the formula in float64, its derivatives, and rows that nearly vanish."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from pefttutor.kernels import row_norms as kernel
from pefttutor.kernels.row_norms import row_norms, row_norms_reference
from pefttutor.memory.allocator import transient_bytes

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def draw(rows=5, columns=7, r=2, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, columns), (r, columns), (rows, r))
    return [torch.randn(shape, generator=generator, dtype=F64).to(dtype) for shape in shapes]


def exact(W, A, B, s):
    return row_norms_reference(W.double(), A.double(), B.double(), s)


@pytest.fixture(params=["expanded", "made"])
def _rows(request, monkeypatch):
    """All rows are made, two of the five at a time; or only those that lost digits."""
    if request.param == "made":
        monkeypatch.setattr(kernel, "ENTRIES", 14)
        monkeypatch.setattr(kernel, "LEFT", 100)


@pytest.mark.usefixtures("way", "_rows")
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("stored", ["out, in", "in, out"])
def test_they_are_the_formula_s_in_every_dtype_also_under_autocast(dtype, stored):
    W, A, B = draw(dtype=dtype)
    if stored == "in, out":
        W = W.t().contiguous().t()
    A = A.to(torch.promote_types(dtype, F32))
    with torch.autocast("cpu", dtype=BF16):
        found = row_norms(W, A, B, 0.5)
    assert found.dtype == A.dtype
    torch.testing.assert_close(found.double(), exact(W, A, B, 0.5), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("way", "_rows")
def test_the_first_and_second_derivatives_are_the_numerical_ones():
    tensors = [t.requires_grad_() for t in draw()]
    assert torch.autograd.gradcheck(partial(row_norms, scaling=0.5), tensors)
    assert torch.autograd.gradgradcheck(partial(row_norms, scaling=0.5), tensors)


@pytest.mark.parametrize("wanted", range(3))
def test_each_gradient_alone(wanted):
    one, other = draw(), draw()
    for tensors in (one, other):
        tensors[wanted].requires_grad_()
    upstream = torch.linspace(-1, 1, 5, dtype=F64)
    row_norms(*one, 0.5).backward(upstream)
    row_norms_reference(*other, 0.5).backward(upstream)
    torch.testing.assert_close(one[wanted].grad, other[wanted].grad)


def nearly_vanishing(left, dtype):
    """Rows of which the change leaves `left` of their length, in a direction of its own."""
    W, A, B = draw(64, 96, 8)
    change = (2.0 * B @ A).to(dtype)
    rest = torch.nn.functional.normalize(W, dim=1) * left * change.double().norm(dim=1, keepdim=True)
    return (rest - change.double()).to(dtype), A.to(dtype), B.to(dtype)


@pytest.mark.parametrize("left", [1.0, 1e-2, 1e-4, 1e-6, 0.0])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_row_that_nearly_vanishes_is_as_precise_as_is_said(way, left, dtype):
    """Made, it is off by some ε S with S = ‖w‖ + s ‖|b| |A|‖; expanded by ε S² / 2n, and never by more than √ε S."""
    W, A, B = nearly_vanishing(left, dtype)
    true, found = exact(W, A, B, 2.0), row_norms(W, A.float(), B.float(), 2.0)
    size = W.double().norm(dim=1) + 2 * (B.double().abs() @ A.double().abs()).norm(dim=1)
    digits = (8 + 96) * torch.finfo(F32).eps
    error = (found.double() - true).abs()
    if way == "threads":
        assert (error <= digits * size).all()
    else:
        assert (error <= torch.minimum(digits * size**2 / (2 * true), digits**0.5 * size)).all()


def test_made_rows_keep_digits_that_the_expanded_square_loses(short_way, monkeypatch):
    """Where a ten-thousandth of each row is left: why a CPU makes these."""
    W, A, B = nearly_vanishing(1e-4, F32)
    true = exact(W, A, B, 2.0)
    off = {}
    for name in ("expanded", "made"):
        off[name] = ((row_norms(W, A, B, 2.0).double() - true).abs() / true).max().item()
        monkeypatch.undo()
    assert off["made"] < 0.02
    assert off["expanded"] > 10 * off["made"]


def test_rows_that_are_left_whole_keep_their_digits_without_being_made(monkeypatch):
    W, A, B = nearly_vanishing(1.0, F32)
    found = row_norms(W, A, B, 2.0)
    torch.testing.assert_close(found.double(), exact(W, A, B, 2.0), rtol=2e-6, atol=0)
    monkeypatch.setattr(kernel, "LEFT", 0.0)  # no row is made
    assert torch.equal(found, row_norms(W, A, B, 2.0))
    monkeypatch.setattr(kernel, "LEFT", 100.0)  # every row is made
    assert not torch.equal(found, row_norms(W, A, B, 2.0))


@pytest.mark.usefixtures("way")
def test_a_row_of_zeros_gets_no_gradient_and_its_neighbours_theirs():
    W, A, B = draw(3, 4)
    W[1], B[1] = 0, 0
    for tensor in (W, A, B):
        tensor.requires_grad_()
    row_norms(W, A, B, 0.5).sum().backward()
    assert not W.grad[1].any()
    assert not B.grad[1].any()
    assert all(t.grad.isfinite().all() for t in (W, A, B))
    assert W.grad[0].all()


@pytest.mark.parametrize("left", [1.0, 0.0])
def test_nothing_as_large_as_the_weight_is_made(left):
    W, A, B = draw(1024, 1024, 8, dtype=F32)
    W = left * W - 2 * (1 - left) * (B @ A)
    room = 4 * (3 * 8 + 8) * 1024 if left else 4 * (4 * kernel.ENTRIES + 40 * 1024)
    assert transient_bytes(lambda: row_norms(W, A, B, 2.0)) <= room
    assert W.nbytes == 16 * 4 * kernel.ENTRIES


def test_no_question_is_asked_of_a_gpu(short_way, watched):
    tensors = [t.requires_grad_() for t in draw()]
    with watched() as asked:
        row_norms(*tensors, 0.5).sum().backward()
    assert not asked


def test_on_the_meta_device():
    tensors = [t.to("meta").requires_grad_() for t in draw()]
    found = row_norms(*tensors, 0.5)
    found.sum().backward()
    assert found.is_meta
    assert all(t.grad.shape == t.shape for t in tensors)
