"""How far the rows of some matrices, and the columns of others, are from orthogonal and of length 1: AdaLoRA's penalty.

    ‖D‖_F,   D = M Mᵀ − I for rows, Mᵀ M − I for columns;   its gradient is 2 D M / ‖D‖_F, or 2 M D / ‖D‖_F

Left to autograd each matrix costs a dozen orders, each for some thousand numbers. Here matrices of one shape are
stacked: they cost one product forward together, and one backward since D is symmetric.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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
    return torch.stack([difference.norm() for difference in off])


def off_orthogonal_norms(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """The same function as the reference, faster for many matrices of few shapes.

    >>> off_orthogonal_norms([torch.eye(2, 3)], [torch.ones(4, 1)])     # 0; 4 − 1
    tensor([0., 3.])

    Shapes: rows k of (r, n), columns l of (n, r), where r and n may differ → (k + l). There is at least one matrix.
    Cost: for each matrix 2·r²·n FLOPs forward and as many backward. Kept for the backward pass: a copy of the matrices,
        and r² numbers of each.
    """
    matrices, shapes = (*rows, *columns), dict[Any, list[int]]()
    for place, matrix in enumerate(matrices):
        kind = place < len(rows), matrix.shape, matrix.dtype, matrix.device
        shapes.setdefault(kind, []).append(place)
    found = [
        _Norms.apply(by_rows, *(matrices[i] for i in places)) for (by_rows, *_), places in shapes.items()
    ]
    device = matrices[0].device
    order = torch.tensor([place for places in shapes.values() for place in places], device=device)
    return torch.cat([norms.to(device) for norms in found])[order.argsort()]


class _Norms(torch.autograd.Function):
    """Of matrices of one shape, by their rows or by their columns."""

    @staticmethod
    def forward(ctx: Any, by_rows: bool, *matrices: Tensor) -> Tensor:
        stacked = torch.stack(matrices)
        with unrounded(stacked):
            off = stacked @ stacked.mT if by_rows else stacked.mT @ stacked
        off.diagonal(dim1=1, dim2=2).sub_(1)
        norms = torch.linalg.vector_norm(off, dim=(1, 2))
        ctx.by_rows = by_rows
        ctx.save_for_backward(stacked, off, norms, *matrices)
        return norms

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stacked, off, norms, *matrices = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient's own gradient is autograd's
            again = off_orthogonal_norms_reference(*((matrices, []) if ctx.by_rows else ([], matrices)))
            wanted = [m for m, needed in zip(matrices, ctx.needs_input_grad[1:], strict=True) if needed]
            found = iter(torch.autograd.grad(again, wanted, grad, create_graph=True))
            return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:])
        share = torch.where(norms > 0, 2 * grad / norms, 0)[
            :, None, None
        ]  # what is orthogonal has no gradient
        with unrounded(off):
            grads = share * off @ stacked if ctx.by_rows else stacked @ (share * off)
        return None, *grads.unbind()
