"""The norms of the rows of a weight with a low-rank change, without ever holding a matrix as large as the weight.

    nᵢ = ‖wᵢ + s bᵢ A‖          for each row wᵢ of W (out, in) and bᵢ of B (out, r)

There are two ways to it, which take the same 2·r FLOPs an entry of the weight:

- a few rows at a time, wᵢ + s bᵢ A is made, measured and dropped while it is in the processor's cache (CPU);
- the expanded square, nᵢ² = ‖wᵢ‖² + 2 s ⟨A wᵢ, bᵢ⟩ + s² bᵢ (A Aᵀ) bᵢᵀ, makes nothing wider than r and is a handful of
  orders (GPU).

With ε the dtype's rounding and S = ‖wᵢ‖ + s ‖|bᵢ| |A|‖, the first is off by at most some (r + in) ε S. The second is off
by as much in nᵢ², times S: that is ε S² / 2nᵢ in nᵢ, and where a row's change takes the row away (nᵢ → 0) up to √ε S.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pefttutor.kernels import threads
from pefttutor.kernels.precision import unrounded

__all__ = ["row_norms", "row_norms_reference"]

ENTRIES = 1 << 16  # of the weight at a time: 256 KiB in float32, which a processor's cache holds


def row_norms_reference(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """‖W + s B A‖ of each row as it is written. Shapes: weight (out, in), A (r, in), B (out, r) → (out)."""
    return (weight + scaling * (B @ A)).norm(dim=1)


def row_norms(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """‖W + s B A‖ of each row, at least in float32, also under autocast.

    >>> W, A, B = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[4.0]])
    >>> row_norms(W, A, B, scaling=0.5)                                  # of [3, 4]
    tensor([5.])

    A row of zeros gets no gradient.

    Shapes: weight (out, in), A (r, in), B (out, r) → (out).
    Cost: (2·r + 3)·out·in FLOPs, and beside the result 65,536 numbers, or one row where that is more; on a GPU 2·r·out.
        Its gradient takes twice as many FLOPs and r·out numbers.
    Source: the expanded square is published as arXiv:2603.22276.
    """
    with unrounded(weight):
        wide = torch.promote_types(weight.dtype, A.dtype)
        return _RowNorms.apply(weight, A.to(wide), B.to(wide), scaling)


class _RowNorms(torch.autograd.Function):
    """A and B have the dtype of the result; the weight is as it is stored, and converted as it is needed."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        norms = (_expanded if threads.short_way(weight.device) else _in_pieces)(weight, A, B, scaling)
        ctx.scaling = scaling
        ctx.save_for_backward(weight, A, B, norms)
        return norms

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With hᵢ = gᵢ / nᵢ: hᵢ (wᵢ + s bᵢ A) for wᵢ, and its products with A and B for these."""
        weight, A, B, norms = ctx.saved_tensors
        needs_weight, needs_A, needs_B, _ = ctx.needs_input_grad
        with unrounded(weight):
            s, W = ctx.scaling, weight.to(A.dtype)
            h = torch.where(norms > 0, grad / norms, 0).unsqueeze(1)  # (out, 1)
            h_B = h * B
            return (
                torch.addmm(h * W, h_B, A, alpha=s).to(weight.dtype) if needs_weight else None,
                s * torch.addmm(h_B.t() @ W, h_B.t() @ B, A, alpha=s) if needs_A else None,
                s * h * torch.addmm(W @ A.t(), B, A @ A.t(), alpha=s) if needs_B else None,
                None,
            )


def _in_pieces(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    norms, rows = A.new_empty(len(weight)), max(1, ENTRIES // weight.shape[1])
    for some in (slice(first, first + rows) for first in range(0, len(weight), rows)):
        changed = torch.addmm(weight[some].to(A.dtype), B[some], A, alpha=scaling)  # (rows, in)
        torch.linalg.vector_norm(changed, dim=1, out=norms[some])
    return norms


def _expanded(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    W = weight.to(A.dtype)
    cross = torch.addmm(W @ A.t(), B, A @ A.t(), beta=2 * scaling, alpha=scaling**2)  # (out, r)
    own = torch.linalg.vector_norm(W, dim=1)
    return torch.addcmul((cross * B).sum(1), own, own).clamp_min_(0).sqrt_()
