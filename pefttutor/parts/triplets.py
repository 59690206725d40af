"""A low-rank change in the form of a singular value decomposition, whose triplets can be taken away one by one.

    ΔW = s · P Λ Q          P (out, r), Λ = diag(λ) (r), Q (r, in)

New are the parameters `lora_B` (P), `lora_E` (λ) and `lora_A` (Q), and the buffer `lora_kept`: which triplets count.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pefttutor.parts.linear import sizes
from pefttutor.parts.lowrank_layer import LowRank

__all__ = ["Triplets", "draw_triplets"]

KEPT = "lora_kept"
STD = 0.02  # of the draws of P and Q


def draw_triplets(layer: nn.Module, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Q and P, normal and small; on the CPU, so that every device gets the same. Shapes: → (r, in), (out, r)."""
    n_in, n_out = sizes(layer)
    Q, P = (
        torch.empty(shape, device="cpu").normal_(std=STD, generator=generator)
        for shape in ((r, n_in), (n_out, r))
    )
    return Q, P


class Triplets(LowRank):
    """y = f(x) + s · drop(x) (Λ Q)ᵀ Pᵀ

    Cost: r · (in + out + 1) values.
    """

    stored = False

    def __init__(
        self,
        path: str,
        layer: nn.Module,
        name: str,
        factors: tuple[Tensor, Tensor],
        *,
        scale_by_rank: bool,
        **how: float,
    ) -> None:
        """factors: Q and P. scale_by_rank: let s grow as fewer triplets count, as scaling · r / rank."""
        r = len(factors[0])
        lambdas, kept = nn.Parameter(torch.zeros(r, 1)), torch.ones(r, dtype=torch.bool)
        super().__init__(path, layer, name, factors, beside={"lora_E": lambdas, KEPT: kept}, **how)  # type: ignore[arg-type]
        self.scale_by_rank = scale_by_rank

    @property
    def triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        """λ (r, 1), Q (r, in) and P (out, r)."""
        return self.held("lora_E"), self.held("lora_A"), self.held("lora_B")

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Λ Q (r, in) and P (out, r)."""
        lambdas, Q, P = self.triplets
        if self.scale_by_rank:
            lambdas = lambdas * (self.r / self.held(KEPT).sum().clamp_min(1))
        return lambdas * Q, P

    @torch.no_grad()
    def cut(self) -> None:
        """λ of the triplets that don't count becomes zero; they may come back."""
        lambdas = self.held("lora_E")
        lambdas.masked_fill_(~self.held(KEPT).view_as(lambdas), 0.0)
