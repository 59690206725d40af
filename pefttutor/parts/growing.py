"""A low-rank change that is given more rank while it trains, and how much the loss depends on it as a whole.

    ΔW = s · P Λ Q          of max_r triplets the first `rank` count, and the next ones learn P and Q in advance

New are the parameters `lora_B` (P), `lora_E` (λ) and `lora_A` (Q), and the buffers `lora_rank`, which holds how many
count and how many learn in advance, and `lora_sensitivity`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor.kernels.precision import unrounded
from pefttutor.parts.layer_change import Compute
from pefttutor.parts.lowrank_layer import LowRank
from pefttutor.parts.triplets import STD

__all__ = ["Growing"]

RANK, SENSITIVITY = "lora_rank", "lora_sensitivity"
AHEAD = 1e-5  # λ of the triplets that learn in advance


class Growing(LowRank):
    """y = f(x) + s · drop(x) (Λ Q)ᵀ Pᵀ

    The layer counts as much as Ī · Ū:

        Ī ← β₁ Ī + (1 − β₁) I,   Ū ← β₂ Ū + (1 − β₂) |I − Ī|,   I = Σ |ΔW ⊙ ∂L/∂ΔW| / √(in · out)

    Cost: max_r · (in + out + 1) values; while it watches, a step forms ΔW and its gradient.
    """

    stored = False
    fused = False

    def __init__(
        self,
        path: str,
        layer: nn.Module,
        name: str,
        factors: tuple[Tensor, Tensor],
        *,
        first: int,
        by_rank: bool,
        **how: Any,
    ) -> None:
        """factors: Q and P. first: how many triplets count at first. by_rank: divide s by how many count."""
        beside = {
            "lora_E": nn.Parameter(torch.zeros(len(factors[0]), 1)),
            RANK: torch.tensor([first, 0], device="cpu"),
            SENSITIVITY: torch.zeros(2, device="cpu"),
        }
        super().__init__(path, layer, name, factors, beside=beside, **how)
        self.by_rank = by_rank
        self.watches = True  # whether more rank may come, so that I is asked for
        self.seen: Tensor | None = None  # I of the passes since the last step

    @property
    def triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        """λ (max_r, 1), Q (max_r, in) and P (out, max_r)."""
        return self.held("lora_E"), self.held("lora_A"), self.held("lora_B")

    @property
    def rank(self) -> int:
        """How many triplets count."""
        return int(self.held(RANK)[0])

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Λ Q (max_r, in) and P (out, max_r), where λ is 0 for triplets that have no part yet."""
        lambdas, Q, P = self.triplets
        rank, ahead = self.held(RANK)
        place = torch.arange(self.r, device=lambdas.device)[:, None]
        lambdas = torch.where(place < rank, lambdas, (place < rank + ahead) * AHEAD)
        return (lambdas / rank if self.by_rank else lambdas) * Q, P

    def forward(self, inner: Compute, own: bool, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (self.watches and self.layer.training and torch.is_grad_enabled()):
            return super().forward(inner, own, x, *args, **kwargs)
        A, B = self.factors
        with unrounded(B):  # in half precision nothing is left of a λ of 0.00001
            delta = self.scaling * (B @ A)
        if delta.requires_grad:
            delta.register_hook(partial(self.note, delta.detach()))
        y = inner(x, *args, **kwargs)
        return y + F.linear(F.dropout(x, self.dropout) if self.drops else x, delta.to(x.dtype)).to(y.dtype)

    @torch.no_grad()
    def note(self, delta: Tensor, gradient: Tensor) -> None:
        now = (delta * gradient).abs().sum() / delta.numel() ** 0.5
        self.seen = now if self.seen is None else self.seen + now

    @torch.no_grad()
    def learn_importance(self, beta1: float, beta2: float) -> None:
        """Average how sensitive the loss was; a layer that no pass came through counts nothing."""
        sensitivity, uncertainty = self.held(SENSITIVITY)
        now = torch.zeros_like(sensitivity) if self.seen is None else self.seen.to(sensitivity)
        sensitivity.lerp_(now, 1 - beta1)
        uncertainty.lerp_((now - sensitivity).abs(), 1 - beta2)
        self.seen = None

    def score(self) -> Tensor:
        """How much the layer counts."""
        return self.held(SENSITIVITY).prod()

    def rows_in_use(self) -> tuple[Tensor, Tensor]:
        """Rows of Q and of Pᵀ that count or learn in advance. Shapes: → (used, in), (used, out)."""
        _, Q, P = self.triplets
        used = int(self.held(RANK).sum())
        return Q[:used], P[:, :used].t()

    @torch.no_grad()
    def grow(self, more: int) -> None:
        """Let `more` triplets count, with the λ that they learned with."""
        rank = self.rank
        self.held("lora_E")[rank : rank + more] = AHEAD
        self.held(RANK).copy_(torch.tensor([rank + more, max(0, int(self.held(RANK)[1]) - more)]))

    @torch.no_grad()
    def reserve(self, ahead: int, generator: torch.Generator) -> None:
        """Let so many triplets learn in advance, as far as there is room; those that are new to it are drawn."""
        _, Q, P = self.triplets
        rank, before = self.held(RANK).tolist()
        used, wanted = rank + before, min(rank + ahead, self.r)
        if wanted > used:
            for rows in (Q[used:wanted], P[:, used:wanted]):
                rows.copy_(torch.empty(rows.shape, device="cpu").normal_(std=STD, generator=generator))
        self.held(RANK)[1] = wanted - rank

    def trace(self, layer: nn.Module, x: Any, tape: Any, kind: str) -> Any:
        """x is kept for ΔW, which is kept for x, and beside it what it is made of."""
        if layer is not self.layer:
            return None
        n_out, n_in = len(self.held("lora_B")), self.held("lora_A").shape[1]
        size = self.held("lora_B").element_size()
        seen, learns = tape.dropout(x, self.dropout), tape.trains(*self.trained())
        if learns:
            tape.save(seen, kind)
            tape.save(x.like(rows=self.r, width=n_in, itemsize=size), kind)  # Λ Q
        if x.grad:
            tape.save(x.like(rows=n_out, width=n_in), kind)
        return x.like(width=n_out, grad=x.grad or learns)
