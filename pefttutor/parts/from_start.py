"""A low-rank change that starts at some singular triplets of the layer's own weight, and counts from there.

    ΔW = s · (B A − B₀ A₀)          s · B₀ A₀ = U_c S_c V_cᵀ,  of the triplets c that are chosen of W₀ = U S Vᵀ

The base keeps its own weight, bit for bit, and what the change starts with is subtracted beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor.parts.layer_change import Compute
from pefttutor.parts.linear import dense_weight
from pefttutor.parts.lowrank_layer import LowRank, singular_factors

__all__ = ["FromStart", "factors_of"]

A_START, B_START = "lora_A_start", "lora_B_start"


def factors_of(layer: nn.Module, chosen: slice, scaling: float) -> tuple[Tensor, Tensor]:
    """`singular_factors` of the layer's weight.

    Shapes: → (r, in), (out, r).
    Raises: ValueError for a layer that can't tell its weight, and where all of them are zero, and so are the factors,
        which then never get a gradient.
    """
    weight = dense_weight(layer)
    A, B = singular_factors(weight, chosen, scaling)
    if not A.is_meta and not A.any():
        raise ValueError(
            f"of a weight of {tuple(weight.shape)} the singular values to start at are all zero, so both factors would "
            "stay zero: take LoRA, which starts at random."
        )
    return A, B


class FromStart(LowRank):
    """y = f(x) + s · (drop(x) Aᵀ Bᵀ − x A₀ᵀ B₀ᵀ): each in products of its own, so that they cancel to the last bit."""

    fused = False
    stored = False

    def __init__(
        self, path: str, layer: nn.Module, name: str, factors: tuple[Tensor, Tensor], **how: float
    ) -> None:
        A, B = (factor.clone() for factor in factors)  # the trained ones move
        super().__init__(path, layer, name, factors, beside={A_START: A, B_START: B}, **how)  # type: ignore[arg-type]

    @property
    def start(self) -> tuple[Tensor, Tensor]:
        """A₀ (r, in) and B₀ (out, r)."""
        return self.held(A_START), self.held(B_START)

    def forward(self, inner: Compute, own: bool, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = inner(x, *args, **kwargs)
        learned = self.branch(F.dropout(x, self.dropout) if self.drops else x, *self.factors)
        return y + (self.scaling * (learned - self.branch(x, *self.start))).to(y.dtype)

    def delta(self) -> Tensor:
        """ΔW = s · (B A − B₀ A₀). Shapes: → (out, in)."""
        A, B = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in self.start)
        return super().delta() - self.scaling * (B @ A)

    def trace(self, layer: nn.Module, x: Any, tape: Any, kind: str) -> Any:
        """What LoRA keeps; next to a weight in half precision also the rounded start."""
        y = super().trace(layer, x, tape, kind)
        if y is not None and x.grad and self.start[0].element_size() != x.itemsize:
            for factor in self.start:
                tape.save(x.like(rows=factor.shape[0], width=factor.shape[1]), kind)
        return y
