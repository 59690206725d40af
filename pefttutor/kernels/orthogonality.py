"""How far the rows of some matrices, and the columns of others, are from orthogonal and of length 1: AdaLoRA's penalty.

    ‖D‖_F,   D = M Mᵀ − I for rows, Mᵀ M − I for columns;   its gradient is 2 D M / ‖D‖_F, or 2 M D / ‖D‖_F

Left to autograd each matrix costs a dozen orders, each for some thousand numbers. Here all differences D lie in one
tensor: a matrix costs one product forward, and one backward since D is symmetric.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pefttutor.kernels import threads
from pefttutor.kernels.precision import unrounded

__all__ = ["off_orthogonal", "off_orthogonal_norms", "off_orthogonal_norms_reference"]


def off_orthogonal(rows: Tensor) -> Tensor:
    """M Mᵀ − I, which is zero where the rows are orthogonal and of length 1; as precise as M, also under autocast.

    >>> off_orthogonal(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    tensor([[1., 1.],
            [1., 0.]])

    Shapes: (r, n) → (r, r). Source: Zhang et al. 2023, arXiv:2303.10512, eq. 4.
    """
    with unrounded(rows):
        return rows @ rows.t() - torch.eye(len(rows), device=rows.device, dtype=rows.dtype)


def off_orthogonal_norms_reference(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """‖M Mᵀ − I‖_F of each matrix by its rows, then of each by its columns.

    Shapes: rows k of (r, n), columns l of (n, r) → (k + l).
    """
    off = [off_orthogonal(matrix) for matrix in (*rows, *(matrix.t() for matrix in columns))]
    return torch.stack([difference.norm().to(off[0].device) for difference in off])


def off_orthogonal_norms(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """The same function as the reference, faster for many matrices of one rank.

    >>> off_orthogonal_norms([torch.eye(2, 3)], [torch.ones(4, 1)])     # 0; 4 − 1
    tensor([0., 3.])

    Shapes: rows k of (r, n), columns l of (n, r), where n may differ → (k + l). There is at least one matrix.
    Cost: for each matrix 2·r²·n FLOPs forward and as many backward. Kept for the backward pass: r² numbers of each.
    """
    matrices = (*rows, *columns)
    kinds = {(m.dtype, m.device, r) for r, m in zip(_ranks(rows, columns), matrices, strict=True)}
    if len(kinds) > 1 or threads.short_way(matrices[0].device):
        return off_orthogonal_norms_reference(rows, columns)
    return _Norms.apply(len(rows), *matrices)


def _ranks(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> list[int]:
    return [len(matrix) for matrix in rows] + [matrix.shape[1] for matrix in columns]


class _Norms(torch.autograd.Function):
    """The first `rows` matrices by their rows, the others by their columns."""

    @staticmethod
    def forward(ctx: Any, rows: int, *matrices: Tensor) -> Tensor:
        first = matrices[0]
        r = first.shape[0 if rows else 1]
        off = first.new_empty(len(matrices), r, r)
        with unrounded(first):
            for i, (matrix, room) in enumerate(zip(matrices, off.unbind(), strict=True)):
                left, right = (matrix, matrix.t()) if i < rows else (matrix.t(), matrix)
                torch.mm(left, right, out=room)
        off.diagonal(dim1=1, dim2=2).sub_(1)
        norms = torch.linalg.vector_norm(off, dim=(1, 2))
        ctx.rows = rows
        ctx.save_for_backward(off, norms, *matrices)
        return norms

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        off, norms, *matrices = ctx.saved_tensors
        rows = ctx.rows
        if torch.is_grad_enabled():  # the gradient's own gradient is autograd's
            again = off_orthogonal_norms_reference(matrices[:rows], matrices[rows:])
            wanted = [m for m, needed in zip(matrices, ctx.needs_input_grad[1:], strict=True) if needed]
            found = iter(torch.autograd.grad(again, wanted, grad, create_graph=True))
            return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:])
        share = torch.where(norms > 0, 2 * grad / norms, 0)  # what is orthogonal has no gradient
        with unrounded(off):
            return None, *(
                (part.mm(matrix) if i < rows else matrix.mm(part)) if ctx.needs_input_grad[i + 1] else None
                for i, (part, matrix) in enumerate(
                    zip((off * share[:, None, None]).unbind(), matrices, strict=True)
                )
            )
