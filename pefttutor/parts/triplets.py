"""A low-rank change in the form of a singular value decomposition, and how much the loss depends on each triplet.

    ΔW = s · P Λ Q          P (out, r), Λ = diag(λ) (r), Q (r, in)

New are the parameters `lora_B` (P), `lora_E` (λ) and `lora_A` (Q), and the buffer `lora_kept`: which triplets count.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pefttutor.parts.attachment import added_key
from pefttutor.parts.linear import sizes
from pefttutor.parts.lowrank_layer import LowRank
from pefttutor.parts.part import hold, let_go

__all__ = ["Triplets", "draw_triplets"]

KEPT, IMPORTANCE = "lora_kept", "lora_importance"
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

    A value w counts as much as Ī · Ū, a triplet as the sum of its λ's and the means over its row of Q and column of P:

        Ī ← β₁ Ī + (1 − β₁) I,   Ū ← β₂ Ū + (1 − β₂) |I − Ī|,   I = |w ∂L/∂w|

    Cost: r · (in + out + 1) values, and two more for each in a buffer that adapter files leave out.
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
        (r, n_in), n_out = factors[0].shape, len(factors[1])
        lambdas, kept = nn.Parameter(torch.zeros(r, 1)), torch.ones(r, dtype=torch.bool)
        super().__init__(path, layer, name, factors, beside={"lora_E": lambdas, KEPT: kept}, **how)  # type: ignore[arg-type]
        self.scale_by_rank = scale_by_rank
        importance = self.held("lora_E").new_zeros(2, r * (n_in + n_out + 1))
        hold(layer, added_key(IMPORTANCE, name), importance.detach(), persistent=False)

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

    def added(self) -> list[Tensor]:
        return [*super().added(), self.held(IMPORTANCE)]

    def remove(self) -> None:
        super().remove()
        let_go(self.layer, added_key(IMPORTANCE, self.name))

    @torch.no_grad()
    def learn_importance(self, beta1: float, beta2: float) -> None:
        """The gradients of a step are there: average how sensitive the loss was. One that got none counts nothing."""
        values = self.triplets
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in values]
        now, of_loss = (torch.cat([t.flatten() for t in tensors]) for tensors in (values, grads))
        sensitivity, uncertainty = self.held(IMPORTANCE)
        sensitivity.lerp_(now.mul_(of_loss).abs_(), 1 - beta1)
        uncertainty.lerp_(now.sub_(sensitivity).abs_(), 1 - beta2)

    def scores(self) -> Tensor:
        """How much each triplet counts. Shapes: → (r)."""
        lambdas, Q, P = self.triplets
        of_lambda, of_Q, of_P = self.held(IMPORTANCE).prod(0).split([t.numel() for t in (lambdas, Q, P)])
        return of_lambda + of_Q.view_as(Q).mean(1) + of_P.view_as(P).mean(0)

    @torch.no_grad()
    def cut(self) -> None:
        """λ of the triplets that don't count becomes zero; they may come back."""
        lambdas = self.held("lora_E")
        lambdas.masked_fill_(~self.held(KEPT).view_as(lambdas), 0.0)
