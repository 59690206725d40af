"""Delta-LoRA: the weight itself moves too, by what each step changes of the low-rank product.

    W_{t+1} = W_t + λ · s · (B_{t+1} A_{t+1} − B_t A_t)          from step K on;  s = lora_alpha / r

No gradient of W is needed. What is added step by step is a telescope: after any number of steps

    W = W₀ + λ · s · (B A − B_K A_K)

so the two products hold all of it, and the base needn't be written at all.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.method import DEFAULT, attaching, learning
from pefttutor.parts.added import NO_STEP, step_counter, steps_of
from pefttutor.parts.lowrank_layer import LowRank, draw_factors
from pefttutor.parts.lowrank_targets import add_lowrank, check_lowrank, count_lowrank
from pefttutor.parts.part import of_kind
from pefttutor.parts.settings import check_number, check_whole

__all__ = ["DeltaLoRA"]

COUNTER = "delta_lora_step"
A_START, B_START, RATIO = "lora_A_start", "lora_B_start", "lora_update_ratio"


@dataclass(frozen=True, kw_only=True)
class DeltaLoRA:
    """LoRA of linear layers and GPT-2's Conv1D whose weight is carried along by the change of the product.

    y = x Wᵀ + b + s · x Aᵀ Bᵀ,   W = W₀ + λ · s · (B A − B_K A_K), a constant for the gradient

    >>> model = nn.ModuleDict({"q_proj": nn.Linear(6, 4)})
    >>> DeltaLoRA(r=2, target_modules=("q_proj",)).count(model)          # 2 · (6 + 4), as LoRA's
    20

    start_steps: K; until then it is LoRA. The steps are counted across calls of `fit`.
    update_ratio: λ.
    r, lora_alpha, target_modules, modules_to_save, init_seed: as in LoRA. There is no dropout, as in the paper.

    The base keeps its own weight, bit for bit: what the paper writes into it is added beside it, and lies in adapter
    files as A_K and B_K. As a change of W₀ what was learned has a rank of up to 2·r.

    Shapes: A (r, in), B (out, r), and what they were at step K.
    Cost: it trains r · (in + out) values a layer (`count`), and holds as many again. A token takes 6·r·(in + out) FLOPs
        more, none once merged.
    Raises: ValueError for a value that makes no sense, before anything is changed.
    Source: Zi et al. 2023, arXiv:2309.02411.
    """

    r: int = 8
    lora_alpha: float = 16
    target_modules: str | Collection[str] = ("q_proj", "v_proj")
    start_steps: int = 500
    update_ratio: float = 2.0
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_lowrank(self, dropout=None)
        check_whole(self, "start_steps", least=0)
        check_number(self, "update_ratio", least=0)

    @property
    def scaling(self) -> float:
        """The factor s of B A."""
        return self.lora_alpha / self.r

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, give its target modules the two factors, and return it.

        Raises: ValueError if the name is in use, a module doesn't exist, or a layer can't be adapted or is smaller
            than r. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            generator = torch.Generator().manual_seed(self.init_seed)
            factors = partial(draw_factors, r=self.r, generator=generator)
            ratio = 0.0 if self.start_steps else self.update_ratio
            add_lowrank(new, model, factors, Carried, words=False, ratio=ratio)
            new.add(step_counter(model, COUNTER, name))
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: Σ r · (in + out) over the targets, and modules_to_save."""
        return count_lowrank(model, self, lambda n_in, n_out: self.r * (n_in + n_out), words=False)

    def after_step(self, model: nn.Module, step: int) -> None:
        """Count; at step K note A and B, from which on the weight moves along."""
        for attachment in learning(model, self):
            counter = steps_of(model, COUNTER, attachment.name)
            counter += 1
            if int(counter) == self.start_steps:
                for part in of_kind(attachment.parts, Carried):
                    part.begin(self.update_ratio)

    def unfinished(self, model: nn.Module) -> str | None:
        """Whether the weight has moved at all."""
        for attachment in learning(model, self):
            done = int(steps_of(model, COUNTER, attachment.name))
            if done <= self.start_steps and self.update_ratio:
                why = "give a smaller one" if done else NO_STEP
                return f"it was LoRA all along, for {done} steps came before start_steps={self.start_steps}: {why}"
        return None


class Carried(LowRank):
    """y = f(x) + s · x Aᵀ Bᵀ + λ s · x (B A − B_K A_K)ᵀ, the last a constant for the gradient of A and B."""

    stored = False

    def __init__(
        self,
        path: str,
        layer: nn.Module,
        name: str,
        factors: tuple[Tensor, Tensor],
        *,
        ratio: float,
        **how: Any,
    ) -> None:
        """ratio: λ at first."""
        A, B = (factor.clone() for factor in factors)  # the trained ones move
        beside = {A_START: A, B_START: B, RATIO: torch.tensor(ratio, device="cpu")}
        super().__init__(path, layer, name, factors, beside=beside, **how)
        self.r = 3 * len(A)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The three products side by side: A (3·r, in) and B (out, 3·r)."""
        A, B = super().factors
        ratio = self.held(RATIO)
        carried, start = ratio * B.detach(), -ratio * self.held(B_START)
        return torch.cat([A, A.detach(), self.held(A_START)]), torch.cat([B, carried, start], 1)

    @torch.no_grad()
    def begin(self, ratio: float) -> None:
        """From now on the weight moves along with A and B as they are."""
        for start, factor in zip((A_START, B_START), super().factors, strict=True):
            self.held(start).copy_(factor)
        self.held(RATIO).fill_(ratio)
