"""AdaLoRA's penalty of many matrices at once: the formula in values, first and second derivatives, and precision."""

from __future__ import annotations

import pytest
import torch

from pefttutor.kernels.orthogonality import (
    off_orthogonal,
    off_orthogonal_norms,
    off_orthogonal_norms_reference,
)

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
ROWS, COLUMNS = [(2, 5), (2, 3), (2, 5)], [(4, 2), (6, 2), (2, 2), (4, 2)]


def draw(shapes, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=F64).to(dtype).requires_grad_() for s in shapes]


def run(function, rows, columns):
    norms = function(rows, columns)
    upstream = torch.linspace(-1, 2, len(norms), dtype=norms.dtype)
    with torch.autocast("cpu", enabled=False):
        grads = torch.autograd.grad(norms, (*rows, *columns), upstream)
    return [norms.detach(), *grads]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("rows", "columns"), [(ROWS, COLUMNS), (ROWS, []), ([], COLUMNS)])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_they_are_the_formula_s_also_under_autocast(rows, columns, dtype):
    found = run(off_orthogonal_norms, draw(rows, dtype), draw(columns, dtype, seed=1))
    exact = run(off_orthogonal_norms_reference, draw(rows), draw(columns, seed=1))
    with torch.autocast("cpu", dtype=BF16):
        cast = run(off_orthogonal_norms, draw(rows, dtype), draw(columns, dtype, seed=1))
    for one, other, true in zip(found, cast, exact, strict=True):
        torch.testing.assert_close(one.double(), true, rtol=1e-5, atol=1e-5)
        assert torch.equal(one, other)


@pytest.mark.usefixtures("way")
def test_first_and_second_derivatives_are_the_numerical_ones():
    def norms(*matrices):
        return off_orthogonal_norms(matrices[:3], matrices[3:])

    matrices = [*draw(ROWS), *draw(COLUMNS[:2], seed=1)]
    assert torch.autograd.gradcheck(norms, matrices)
    assert torch.autograd.gradgradcheck(norms, matrices)
    matrices[1].requires_grad_(False)
    assert torch.autograd.gradcheck(norms, matrices)
    assert torch.autograd.gradgradcheck(norms, matrices)


@pytest.mark.usefixtures("way")
def test_what_is_orthogonal_has_no_gradient_and_the_others_theirs():
    one, other = torch.eye(2, 3, requires_grad=True), torch.ones(4, 2, requires_grad=True)
    norms = off_orthogonal_norms([one], [other])
    norms.sum().backward()
    assert norms[0] == 0
    assert not one.grad.any()
    assert other.grad.all()


def test_matrices_of_several_ranks_or_dtypes_are_the_formula_s_too():
    for rows in (draw([(2, 5), (3, 5)]), [*draw([(2, 5)]), *draw([(2, 5)], F32)]):
        assert torch.equal(off_orthogonal_norms(rows, []), off_orthogonal_norms_reference(rows, []))


def test_the_difference_is_as_precise_as_the_matrix():
    with torch.autocast("cpu", dtype=BF16):
        assert off_orthogonal(torch.eye(2, 3, dtype=F64)).dtype == F64
        assert off_orthogonal(torch.eye(2, 3)).dtype == F32
