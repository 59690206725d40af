"""The norms of the rows of a weight with a low-rank change, without ever making a matrix as large as the weight.

    nᵢ = ‖wᵢ + s bᵢ A‖          for each row wᵢ of W (out, in) and bᵢ of B (out, r)

The square is expanded, so that nothing wider than r is made:

    nᵢ² = ‖wᵢ‖² + 2 s ⟨A wᵢ, bᵢ⟩ + s² bᵢ (A Aᵀ) bᵢᵀ

With ε the dtype's rounding and S = ‖wᵢ‖ + s ‖|bᵢ| |A|‖ this is off by at most some (r + in) ε S² in nᵢ², which is
(r + in) ε S² / 2nᵢ in nᵢ: harmless as long as the change leaves a good part of the row. Where it takes the row away
(nᵢ → 0), it can be √ε S, half of the digits. On a CPU such rows are therefore made, a few at a time, and measured: then
nᵢ is off by at most some (r + in) ε S. A GPU would have to be asked which rows these are, and isn't.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pefttutor.kernels import threads
from pefttutor.kernels.precision import unrounded

__all__ = ["row_norms", "row_norms_reference"]

LEFT = 1 / 4  # of a row's norm: below that it is made. Else S is some 9 nᵢ at most
ENTRIES = 1 << 16  # that are made at a time: 256 KiB in float32, which a processor's cache holds


def row_norms_reference(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """‖W + s B A‖ of each row as it is written. Shapes: weight (out, in), A (r, in), B (out, r) → (out)."""
    return (weight + scaling * (B @ A)).norm(dim=1)


def row_norms(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """‖W + s B A‖ of each row, at least in float32, also under autocast. A row of zeros gets no gradient.

    >>> W, A, B = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[4.0]])
    >>> row_norms(W, A, B, scaling=0.5)                                  # of [3, 4]
    tensor([5.])

    Shapes: weight (out, in), A (r, in), B (out, r) → (out).
    Cost: (2·r + 2)·out·in FLOPs and 2·r·out numbers; 65,536 numbers where rows are made; a weight in half precision is
        converted to float32. The gradient takes twice as many.
    Source: the expanded square is published as arXiv:2603.22276.
    """
    with unrounded(weight):
        wide = torch.promote_types(weight.dtype, A.dtype)
        return _RowNorms.apply(weight, A.to(wide), B.to(wide), scaling)


class _RowNorms(torch.autograd.Function):
    """A and B have the dtype of the result; the weight is as it is stored."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        W = weight.to(A.dtype)
        own = torch.linalg.vector_norm(W, dim=1)  # (out)
        cross = torch.addmm(A.mm(W.t()).t(), B, A.mm(A.t()), beta=2 * scaling, alpha=scaling**2)  # (out, r)
        norms = torch.addcmul(cross.mul_(B).sum(1), own, own).clamp_min_(0).sqrt_()
        if not threads.short_way(weight.device):
            for some in (norms < LEFT * own).nonzero().squeeze(1).split(max(1, ENTRIES // W.shape[1])):
                made = torch.addmm(W[some], B[some], A, alpha=scaling)  # (some, in)
                norms[some] = torch.linalg.vector_norm(made, dim=1)
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
