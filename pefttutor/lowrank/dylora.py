"""DyLoRA: one training gives the LoRA of every rank up to r.

    ΔW_b = (lora_alpha / b) · B_{:,1…b} A_{1…b,:}          b = 1 … r

Each step draws a b for the whole model, computes with the first b directions, and trains the b-th alone. So the first
directions learn to do without the later ones, and afterwards the model works with any number of them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.method import DEFAULT, attaching, find_own, learning
from pefttutor.parts.added import NO_STEP, step_counter, steps_of
from pefttutor.parts.drawing import drawn_again
from pefttutor.parts.lowrank_layer import LowRank, draw_factors
from pefttutor.parts.lowrank_targets import add_lowrank, check_lowrank, count_lowrank
from pefttutor.parts.part import of_kind
from pefttutor.parts.settings import check_choice

__all__ = ["DyLoRA"]

COUNTER, RANKS = "dylora_step", "lora_ranks"


@dataclass(frozen=True, kw_only=True)
class DyLoRA:
    """Dynamic search-free low-rank adaptation of linear layers and GPT-2's Conv1D.

    y = x W₀ᵀ + bias + (lora_alpha / b) · drop(x) A_{1…b,:}ᵀ B_{:,1…b}ᵀ

        method = DyLoRA(r=8);  method.attach(model);  pefttutor.fit(model, …);  method.use_rank(model, 3)

    >>> method = DyLoRA(r=3)
    >>> [method.drawn_rank(step) for step in range(8)]
    [1, 2, 3, 1, 3, 3, 3, 3]

    r: the largest rank. lora_alpha: the strength; a rank b has the scale lora_alpha / b.
    frozen: whether a step trains the b-th direction alone, as in the released scripts; else all b.
    target_modules, lora_dropout, modules_to_save, init_seed: as in LoRA; the seed also fixes the drawn ranks.

    What a step hasn't drawn keeps its value, whatever the optimizer's momentum and decay would do to it. (In the
    released code Adam's momentum moves directions that were drawn before.) The steps are counted across calls of
    `fit`. In evaluation the rank is r, or what `use_rank` has set, which adapter files hold.

    Shapes: A (r, in), B (out, r).
    Cost: LoRA's of rank r, in training also for small b.
    Raises: ValueError for a value that makes no sense, before anything is changed.
    Source: Valipour et al. 2023, arXiv:2210.07558, section 3 and algorithm 1.
    """

    r: int = 8
    lora_alpha: float = 16
    target_modules: str | Collection[str] = ("q_proj", "v_proj")
    lora_dropout: float = 0.0
    frozen: bool = True
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_lowrank(self)
        check_choice(self, "frozen", (True, False))

    @property
    def scaling(self) -> float:
        """The scale of rank r."""
        return self.lora_alpha / self.r

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, give its target modules the two factors, and return it.

        Raises: ValueError if the name is in use, a module doesn't exist, or a layer can't be adapted or is smaller
            than r. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            generator = torch.Generator().manual_seed(self.init_seed)
            factors, ranks = (
                partial(draw_factors, r=self.r, generator=generator),
                (self.drawn_rank(0), self.r),
            )
            add_lowrank(new, model, factors, Nested, words=False, ranks=ranks, frozen=self.frozen)
            new.add(step_counter(model, COUNTER, name))
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: Σ r · (in + out) over the targets, and modules_to_save."""
        return count_lowrank(model, self, lambda n_in, n_out: self.r * (n_in + n_out), words=False)

    def drawn_rank(self, step: int) -> int:
        """The b of a step, counted from 0: uniform among 1 … r, the same for a seed on every machine."""
        return 1 + int(self.r * float(drawn_again((1,), self.init_seed, stream=step)))

    def use_rank(self, model: nn.Module, rank: int, *, name: str | None = None) -> nn.Module:
        """Let the model compute with the first `rank` directions in evaluation, and return it.

        name: of the attachment, where there are several.

        Raises: ValueError for a rank that isn't among 1 … r, and without an attachment of this method; RuntimeError if
            it is merged.
        """
        attachment = find_own(model, self, name, changing="rank")
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= self.r:
            raise ValueError(f"rank is {rank!r}; it must be a whole number from 1 to r, {self.r}.")
        for part in of_kind(attachment.parts, Nested):
            part.held(RANKS)[1] = rank
        return model

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Note what the optimizer may not move."""
        for attachment in learning(model, self):
            for part in of_kind(attachment.parts, Nested):
                part.note()

    def after_step(self, model: nn.Module, step: int) -> None:
        """Put back what wasn't drawn, and draw the next step's rank."""
        for attachment in learning(model, self):
            counter = steps_of(model, COUNTER, attachment.name)
            counter += 1
            rank = self.drawn_rank(int(counter))
            for part in of_kind(attachment.parts, Nested):
                part.put_back()
                part.held(RANKS)[0] = rank

    def unfinished(self, model: nn.Module) -> str | None:
        """Whether ranks were drawn at all."""
        for attachment in learning(model, self):
            if not int(steps_of(model, COUNTER, attachment.name)):
                return f"only one rank was trained, for {NO_STEP}"
        return None


class Nested(LowRank):
    """y = f(x) + s · r/b · drop(x) A_{1…b,:}ᵀ B_{:,1…b}ᵀ, with the drawn b in training and the chosen one else."""

    stored = False

    def __init__(
        self,
        path: str,
        layer: nn.Module,
        name: str,
        factors: tuple[Tensor, Tensor],
        *,
        ranks: tuple[int, int],
        frozen: bool,
        **how: Any,
    ) -> None:
        super().__init__(path, layer, name, factors, beside={RANKS: torch.tensor(ranks, device="cpu")}, **how)
        self.frozen = frozen
        self.noted: tuple[Tensor, Tensor] | None = None  # A and B as they were before the optimizer's step

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The first b rows of A, scaled, and B; the other rows of A are zero, so that nothing waits for a GPU's b."""
        training = self.layer.training
        A, B = super().factors
        if training and self.frozen:
            drawn = self.drawn()
            A, B = torch.where(drawn[:, None], A, A.detach()), torch.where(drawn, B, B.detach())
        return self.shares(0 if training else 1, A.dtype)[:, None] * A, B

    def shares(self, which: int, dtype: torch.dtype) -> Tensor:
        """r / b for the first b directions, and 0 for the others. Shapes: → (r)."""
        rank = self.held(RANKS)[which]
        return (torch.arange(self.r, device=rank.device) < rank) * (self.r / rank.to(dtype))

    def drawn(self) -> Tensor:
        """Which directions a step trains. Shapes: → (r)."""
        rank, places = self.held(RANKS)[0], torch.arange(self.r, device=self.held(RANKS).device)
        return places == rank - 1 if self.frozen else places < rank

    def delta(self) -> Tensor:
        """ΔW with the chosen rank, also in training. Shapes: → (out, in)."""
        A, B = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in super().factors)
        return self.scaling * (B @ (self.shares(1, A.dtype)[:, None] * A))

    @torch.no_grad()
    def note(self) -> None:
        A, B = super().factors
        self.noted = A.clone(), B.clone()

    @torch.no_grad()
    def put_back(self) -> None:
        """What the step hasn't drawn becomes what was noted."""
        if self.noted is not None:
            drawn, (A, B), (A_before, B_before) = self.drawn(), super().factors, self.noted
            A.copy_(torch.where(drawn[:, None], A, A_before))
            B.copy_(torch.where(drawn, B, B_before))
        self.noted = None
