"""The other DoRA, dynamic low-rank adaptation: each layer begins with too many directions, and the least ones go.

    ΔW = s · Σᵢ cᵢ bᵢ aᵢᵀ,   s = lora_alpha / init_r          aᵢ (in), bᵢ (out)

That is AdaLoRA's sum of triplets. A triplet counts by its share of what its layer has changed, not by what the loss
says; and what is kept small is the spread of the values within each aᵢ and bᵢ, not their distance from orthogonal.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pefttutor.kernels.precision import unrounded
from pefttutor.method import DEFAULT, attaching, attachments_of, learning
from pefttutor.parts.added import Shared, step_counter, steps_of
from pefttutor.parts.attachment import Attachment
from pefttutor.parts.linear import sizes
from pefttutor.parts.lowrank_targets import add_lowrank, check_lowrank, count_lowrank
from pefttutor.parts.part import of_kind
from pefttutor.parts.rank_budget import behind, check_budget, check_length, ranks_of
from pefttutor.parts.settings import check_number, check_whole
from pefttutor.parts.triplets import Triplets, keep_highest

__all__ = ["DynamicDoRA"]

COUNTER, SHARES = "dynamic_dora_step", "lora_shares"
SMALL = 1e-8  # added to ‖ΔW‖_F, which is 0 at the start


@dataclass(frozen=True, kw_only=True)
class DynamicDoRA:
    """Low-rank adaptation whose smallest directions are taken away while it trains.

        method = DynamicDoRA(init_r=12, target_r=8, total_step=1000)
        method.attach(model);  pefttutor.fit(model, …, steps=1000);  method.ranks(model)

    >>> method = DynamicDoRA(init_r=4, target_r=2, total_step=20, target_modules=("0",))
    >>> [method.budget(step, layers=10) for step in (2, 3, 6, 8, 10, 19)]
    [40, 40, 39, 33, 20, 20]

    It isn't `DoRA`, which is Liu's weight decomposition and has the same name in the papers.

    init_r, target_r: triplets a layer has at first, and on average in the end. Those that were taken away can come back
        until the budget has come down: only c is set to zero, and a, b and c go on training.
    total_step, tinit, tfinal, deltaT: how many steps the training has; for how many all stay at first, which is 15 % of
        them where nothing is said; and as they are in the end, 50 %; and every how many steps in between they are
        chosen anew.
    beta: how slowly a triplet's share is averaged.
    var_reg_weight: the weight of the penalty, which is the mean variance within all aᵢ and bᵢ, until the budget has
        come down.
    lora_alpha, target_modules, lora_dropout, modules_to_save, init_seed: as in LoRA.

    The share of a triplet is |cᵢ| ‖aᵢ‖ ‖bᵢ‖ / ‖ΔW‖_F, within its layer, so that a layer whose change is small keeps
    as much as others. The budget falls slowly at first, with the cube of the time, and exactly so many stay as it has:
    the released code takes one away at once, and all whose shares are equal together.

    The steps are counted across calls of `fit`. Adapter files hold a, b, c, what is kept and the count; the averaged
    shares lie in the model and in checkpoints, and start anew in a loaded adapter.

    Shapes: P = (bᵢ) (out, r), c (r, 1), Q = (aᵢ) (r, in), with r = init_r also when ranks have gone.
    Cost: it trains r · (in + out + 1) values a layer (`count`); a step takes r² · (in + out) FLOPs for the shares and
        two passes over a and b for the penalty; nothing once merged.
    Raises: ValueError for a value that makes no sense, before anything is changed.
    Source: Mao et al. 2024, arXiv:2405.17357, with the settings of the authors' code.
    """

    init_r: int = 12
    target_r: int = 8
    total_step: int | None = None
    tinit: int | None = None
    tfinal: int | None = None
    deltaT: int = 1
    beta: float = 0.9
    var_reg_weight: float = 0.1
    lora_alpha: float = 8
    target_modules: str | Collection[str] = ("q_proj", "v_proj")
    lora_dropout: float = 0.0
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_lowrank(self, rank="init_r")
        check_budget(self)
        check_whole(self, "deltaT")
        check_number(self, "beta", above=0, below=1)
        check_number(self, "var_reg_weight", least=0)
        for name in ("tinit", "tfinal"):
            if getattr(self, name) is not None:
                check_whole(self, name, least=0)
        if self.total_step is not None:
            first, last = self._falls()
            check_length(self, first + self.total_step - last)

    @property
    def scaling(self) -> float:
        """The factor s of Σ c b aᵀ."""
        return self.lora_alpha / self.init_r

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, give its target modules their triplets, and return it.

        Raises: ValueError without total_step, if the name is in use, a module doesn't exist, or a layer can't be
            adapted or is smaller than init_r. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            if self.total_step is None:
                raise ValueError(
                    "total_step is None; DynamicDoRA must know how many steps fit will take: total_step=…"
                )
            factors = partial(_draw, r=self.init_r, generator=torch.Generator().manual_seed(self.init_seed))
            add_lowrank(new, model, factors, Triplets, rank="init_r", scale_by_rank=False)
            layers = of_kind(new.parts, Triplets)
            shares = layers[0].triplets[0].detach().new_zeros(len(layers), self.init_r)
            new.add(Shared(model, name, {SHARES: shares}, stored=False))
            new.add(step_counter(model, COUNTER, name))
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: Σ r · (in + out + 1) over the targets, and modules_to_save."""
        return count_lowrank(model, self, lambda n_in, n_out: self.init_r * (n_in + n_out + 1), rank="init_r")

    def ranks(self, model: nn.Module) -> dict[str, int]:
        """How many triplets each layer has kept, by its name in the model."""
        return ranks_of(attachments_of(model, self))

    def budget(self, step: int, layers: int) -> int:
        """How many triplets all layers have together after a step, counted from 0."""
        first, last = self._falls()
        gone = min(max((step - first) / (last - first), 0), 1) ** 3
        return self.init_r * layers - int((self.init_r - self.target_r) * layers * gone)

    def penalty(self, model: nn.Module) -> Tensor:
        """What is added to the loss until the budget has come down: the mean variance within all a and b."""
        rows = [
            values
            for a in learning(model, self)
            if int(steps_of(model, COUNTER, a.name)) <= self._falls()[1]
            for _, Q, P in (part.triplets for part in of_kind(a.parts, Triplets))
            for values in (Q.var(1), P.var(0))
        ]
        if not rows or not self.var_reg_weight:
            return torch.zeros((), requires_grad=True)
        return self.var_reg_weight * torch.cat([variances.to(rows[0].device) for variances in rows]).mean()

    def after_step(self, model: nn.Module, step: int) -> None:
        """Average each triplet's share, and take the smallest ones away where that is due."""
        for attachment in learning(model, self):
            self._choose(attachment, steps_of(model, COUNTER, attachment.name))

    def _choose(self, attachment: Attachment, counter: Tensor) -> None:
        step, (first, last) = int(counter), self._falls()
        counter += 1
        layers, (shared,) = of_kind(attachment.parts, Triplets), of_kind(attachment.parts, Shared)
        due = first <= step <= last and ((step - first) % self.deltaT == 0 or step == last)
        if step <= last:
            (averages,) = shared.added()
            now = torch.stack([_shares(layer).to(averages) for layer in layers])
            averages.lerp_(now, 1 - self.beta)
            # A loaded adapter that has seen no step of its own keeps what it has.
            if due and averages.any():
                keep_highest(layers, averages.flatten(), self.budget(step, len(layers)))
        if due or step > last:
            for layer in layers:
                layer.cut()

    def _falls(self) -> tuple[int, int]:
        """The first step and the last one after which triplets are taken away."""
        assert self.total_step is not None
        first = int(0.15 * self.total_step) if self.tinit is None else self.tinit
        after = int(0.5 * self.total_step) if self.tfinal is None else self.tfinal
        return first, self.total_step - max(after, 1)

    def unfinished(self, model: nn.Module) -> str | None:
        """Whether the budget has come down to its target, and if not, why."""
        for attachment in learning(model, self):
            layers, done = of_kind(attachment.parts, Triplets), steps_of(model, COUNTER, attachment.name)
            if words := behind(self, len(layers), int(done), self._falls()[1] + 1):
                return words
        return None


def _draw(layer: nn.Module, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Uniform, Q in ±√(6/in) and P in ±√(6/r); on the CPU, so that every device gets the same."""
    n_in, n_out = sizes(layer)
    Q, P = torch.empty(r, n_in, device="cpu"), torch.empty(n_out, r, device="cpu")
    for matrix in (Q, P):
        bound = math.sqrt(6 / matrix.shape[1])
        matrix.uniform_(-bound, bound, generator=generator)
    return Q, P


@torch.no_grad()
def _shares(layer: Triplets) -> Tensor:
    """|cᵢ| ‖aᵢ‖ ‖bᵢ‖ / ‖Σᵢ cᵢ bᵢ aᵢᵀ‖_F, without building the sum. Shapes: → (r)."""
    c, Q, P = layer.triplets
    scaled = c * Q
    with unrounded(Q):  # a loop of one's own may take its step under autocast
        of_pairs = (scaled @ scaled.t()) * (P.t() @ P)  # ⟨cᵢ bᵢ aᵢᵀ, cⱼ bⱼ aⱼᵀ⟩
    return of_pairs.diagonal().sqrt() / (of_pairs.sum().clamp_min(0).sqrt() + SMALL)
