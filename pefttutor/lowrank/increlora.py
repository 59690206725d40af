"""IncreLoRA: every layer starts with little rank, and those that turn out to need more are given it while training.

    ΔW = s · P Λ Q          P (out, r), Λ = diag(λ) (r), Q (r, in);  s = lora_alpha / target_r

It goes the other way than AdaLoRA, which begins with much and takes away. The next triplets of each layer learn P and Q
in advance, with a λ of 0.00001 that stays as it is, so that a layer that is given them can use them at once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pefttutor.kernels.orthogonality import off_orthogonal
from pefttutor.method import DEFAULT, attaching, attachments_of, learning
from pefttutor.parts.added import NO_STEP, step_counter, steps_of
from pefttutor.parts.growing import Growing
from pefttutor.parts.lowrank_targets import add_lowrank, check_lowrank, count_lowrank
from pefttutor.parts.part import of_kind
from pefttutor.parts.settings import check_choice, check_number, check_whole
from pefttutor.parts.triplets import draw_triplets

__all__ = ["IncreLoRA"]

COUNTER = "increlora_step"


@dataclass(frozen=True, kw_only=True)
class IncreLoRA:
    """Incremental low-rank adaptation of linear layers and GPT-2's Conv1D: ranks grow where the loss asks for them.

        method = IncreLoRA(target_r=4, incre_interval=100, top_h=6)
        method.attach(model);  pefttutor.fit(model, …, steps=1000);  method.ranks(model)

    >>> method = IncreLoRA(target_r=3, incre_interval=10, top_h=2)
    >>> method.steps_needed(layers=4)                   # (3 − 1) · 4 ranks, 2 at a time, every 10 steps from step 10
    41

    init_r, target_r: triplets that each layer has at first, and the layers on average in the end.
    max_r: for how many each layer has room. Here they are held from the start; the paper gives a layer any number.
    incre_interval, init_warmup: ranks are given out every so many steps, after so many at first.
    top_h, incre_rank_num: to how many layers, and how many each of them gets.
    beta1, beta2: how slowly a layer's sensitivity and its uncertainty are averaged.
    orth_reg_weight: γ of the penalty γ · mean ‖M Mᵀ − I‖_F over Q and Pᵀ of all layers. (The released code takes it of
        every piece that was added by itself, which with one triplet a piece keeps lengths at 1 and no angles.)
    lora_alpha, target_modules, lora_dropout, modules_to_save, init_seed: as in LoRA.
    scale_by_rank: s = lora_alpha / the rank that the layer has now, as the released code has it, where a layer that
        grows from r to r + 1 shrinks what it has learned to r / (r + 1).

    A layer is scored by Ī · Ū, where Ī averages I = Σ |ΔW ⊙ ∂L/∂ΔW| / √(in · out), and Ū averages |I − Ī|; that is the
    released code's. The steps are counted across calls of `fit`.

    A new triplet has no warm-up: it learns at the rate that the schedule has come to, and AdamW, which counts its steps
    for whole tensors, doesn't hold its first steps back as at the start. (The paper has a restart warmup for each piece
    that is added, `multi_lr` in the released code.)

    Shapes: P (out, max_r), λ (max_r, 1), Q (max_r, in).
    Cost: it holds max_r · (in + out + 1) values a layer (`count`), of which those of the ranks given out train. Until
        all are, a step forms ΔW and its gradient, each as large as the weight, and takes 4·in·out FLOPs more a token;
        then, and in evaluation, 4·max_r·(in + out) and 2·max_r·(in + out); nothing once merged.
    Raises: ValueError for a value that makes no sense, before anything is changed.
    Source: Zhang et al. 2023, arXiv:2308.12043, and the authors' code.
    """

    init_r: int = 1
    target_r: int = 8
    max_r: int = 16
    incre_interval: int = 100
    init_warmup: int = 0
    top_h: int = 3
    incre_rank_num: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.1
    lora_alpha: float = 16
    target_modules: str | Collection[str] = ("q_proj", "v_proj")
    lora_dropout: float = 0.0
    scale_by_rank: bool = False
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_lowrank(self, rank="init_r")
        for name in ("target_r", "max_r", "incre_interval", "top_h", "incre_rank_num"):
            check_whole(self, name)
        check_whole(self, "init_warmup", least=0)
        for name in ("beta1", "beta2"):
            check_number(self, name, above=0, below=1)
        check_number(self, "orth_reg_weight", least=0)
        check_choice(self, "scale_by_rank", (True, False))
        if not self.init_r <= self.target_r <= self.max_r:
            raise ValueError(
                f"init_r, target_r and max_r are {self.init_r}, {self.target_r} and {self.max_r}; none may be larger "
                "than the next, for ranks only come, up to max_r."
            )

    @property
    def scaling(self) -> float:
        """The factor s of P Λ Q, as long as it doesn't follow the rank."""
        return self.lora_alpha / self.target_r

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, give its target modules their triplets, and return it.

        Raises: ValueError if the name is in use, a module doesn't exist, or a layer can't be adapted or is smaller than
            max_r. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            generator = torch.Generator().manual_seed(self.init_seed)
            drawn = partial(draw_triplets, r=self.max_r, generator=generator)
            kind = partial(Growing, first=self.init_r, by_rank=self.scale_by_rank)
            s = self.lora_alpha if self.scale_by_rank else self.scaling
            add_lowrank(new, model, drawn, kind, rank="max_r", words=False, scaling=s)
            new.add(step_counter(model, COUNTER, name))
        return model

    def count(self, model: nn.Module) -> int:
        """How many values it holds to train, without attaching: Σ max_r · (in + out + 1), and modules_to_save."""
        return count_lowrank(
            model, self, lambda n_in, n_out: self.max_r * (n_in + n_out + 1), rank="max_r", words=False
        )

    def ranks(self, model: nn.Module) -> dict[str, int]:
        """How many triplets each layer has been given, by its name in the model."""
        return {
            part.path: part.rank for a in attachments_of(model, self) for part in of_kind(a.parts, Growing)
        }

    def steps_needed(self, layers: int) -> int:
        """How many steps give out all ranks, where no layer runs out of room."""
        missing, interval = (self.target_r - self.init_r) * layers, self.incre_interval
        rounds = -(-missing // (min(self.top_h, layers) * self.incre_rank_num))
        return (self.init_warmup // interval + rounds) * interval + 1 if missing else 1

    def penalty(self, model: nn.Module) -> Tensor:
        """What is added to the loss to keep the rows of Q and the columns of P orthogonal, of the triplets in use."""
        parts = [part for a in learning(model, self) for part in of_kind(a.parts, Growing)]
        if not parts or not self.orth_reg_weight:
            return torch.zeros((), requires_grad=True)
        norms = [off_orthogonal(rows).norm() for part in parts for rows in part.rows_in_use()]
        return self.orth_reg_weight * torch.stack(norms).mean()

    def after_step(self, model: nn.Module, step: int) -> None:
        """Learn from the step which layers count, and give them rank where that is due."""
        for attachment in learning(model, self):
            self._grow(of_kind(attachment.parts, Growing), steps_of(model, COUNTER, attachment.name))

    def _grow(self, parts: list[Growing], counter: Tensor) -> None:
        step, total = int(counter), sum(part.rank for part in parts)
        counter += 1
        left = self.target_r * len(parts) - total
        generator = torch.Generator().manual_seed(self.init_seed + step + 1)
        if step == 0 and left:
            for part in parts:
                part.reserve(self.incre_rank_num, generator)
        if left:
            for part in parts:
                part.learn_importance(self.beta1, self.beta2)
            if step > self.init_warmup and step % self.incre_interval == 0:
                left -= self._give_out(parts, left, generator)
        for part in parts:
            part.watches = left > 0
            if not left:
                part.reserve(0, generator)

    def _give_out(self, parts: list[Growing], left: int, generator: torch.Generator) -> int:
        """To the layers of the highest scores that have room; return how many ranks were given."""
        able = sorted(
            (part for part in parts if part.rank < self.max_r), key=lambda part: -float(part.score())
        )
        given = 0
        for part in able[: self.top_h]:
            more = min(self.incre_rank_num, self.max_r - part.rank, left - given)
            part.grow(more)
            part.reserve(self.incre_rank_num, generator)
            given += more
        return given

    def unfinished(self, model: nn.Module) -> str | None:
        """Whether all ranks were given out, and if not, why."""
        for attachment in learning(model, self):
            parts, done = of_kind(attachment.parts, Growing), int(steps_of(model, COUNTER, attachment.name))
            total, wanted = sum(part.rank for part in parts), self.target_r * len(parts)
            if total < wanted and done == 0:
                return f"the ranks never grew from {total}, for {NO_STEP}"
            if total < wanted:
                return (
                    f"the ranks have come to {total}, not to {wanted}, for the training had {done} steps and growing "
                    f"takes {self.steps_needed(len(parts))}: train on, or give a smaller incre_interval or a larger "
                    "top_h"
                )
        return None
