"""AdaLoRA: give each layer as much rank as it turns out to need, out of one shrinking budget.

    ΔW = s · P Λ Q          P (out, r), Λ = diag(λ) (r), Q (r, in);  s = lora_alpha / init_r

P and Q are kept near orthogonal by a penalty, so that λ plays the part of singular values. All triplets (P's column, λ,
Q's row) of all layers are ranked by how much the loss has come to depend on them, and the λ of the last ones are zero.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pefttutor.kernels.orthogonality import off_orthogonal_norms
from pefttutor.method import DEFAULT, attaching, attachments_of, learning
from pefttutor.parts.added import step_counter, steps_of
from pefttutor.parts.importances import Importances
from pefttutor.parts.lowrank_targets import add_lowrank, check_lowrank, count_lowrank
from pefttutor.parts.part import Part, of_kind
from pefttutor.parts.rank_budget import behind, check_budget, check_length, ranks_of
from pefttutor.parts.settings import check_choice, check_number, check_whole
from pefttutor.parts.triplets import Triplets, draw_triplets, keep_highest

__all__ = ["AdaLoRA"]

COUNTER = "adalora_step"


@dataclass(frozen=True, kw_only=True)
class AdaLoRA:
    """Low-rank adaptation with a rank for each layer that is found while it trains.

        method = AdaLoRA(init_r=12, target_r=8, total_step=1000, tinit=100, tfinal=300)
        method.attach(model);  pefttutor.fit(model, …, steps=1000);  method.ranks(model)

    >>> method = AdaLoRA(init_r=4, target_r=2, total_step=8, tinit=2, tfinal=2, target_modules=("0",))
    >>> [method.budget(step, layers=10) for step in range(8)]
    [40, 40, 40, 28, 22, 20, 20, 20]

    init_r, target_r: triplets a layer has at first, and on average in the end. Ranks that were taken away can come back
        until the last `tfinal` steps: only λ is set to zero, and P, λ and Q go on training.
    total_step, tinit, tfinal, deltaT: how many steps the training has; for how many the budget stays at first; and as
        it is in the end; and every how many steps ranks are given out in between.
    beta1, beta2: how slowly sensitivity and its uncertainty are averaged.
    orth_reg_weight, squared_penalty: γ, and whether the penalty is the paper's, γ Σ ‖·‖²_F over all P and Q, or γ times
        the mean of ‖·‖_F, as the authors' code and HF PEFT have it.
    lora_alpha, target_modules, lora_dropout, modules_to_save, init_seed: as in LoRA.
    scale_by_rank: s = lora_alpha / the rank that the layer has now. The released codes keep lora_alpha / init_r, so
        that what stays isn't changed when others go.

    The steps are counted across calls of `fit`. Adapter files hold P, λ, Q, the ranks and the count; the importances
    lie in the model and in checkpoints, and start anew in a loaded adapter.

    Shapes: P (out, r), λ (r, 1), Q (r, in), with r = init_r also when the ranks have shrunk.
    Cost: it trains r · (in + out + 1) values a layer (`count`) and holds two more for each; a step takes some ten
        passes over these, and r² · (in + out) FLOPs for the penalty; nothing once merged.
    Raises: ValueError for a value that makes no sense, before anything is changed.
    Source: Zhang et al. 2023, arXiv:2303.10512, eq. 3 to 13 and algorithm 1. Sensitivity is |w ∂L/∂w| with w after the
        step and the gradient before it, as in the authors' code.
    """

    init_r: int = 12
    target_r: int = 8
    total_step: int | None = None
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    squared_penalty: bool = False
    lora_alpha: float = 8
    target_modules: str | Collection[str] = ("q_proj", "v_proj")
    lora_dropout: float = 0.0
    scale_by_rank: bool = False
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_lowrank(self, rank="init_r")
        check_budget(self)
        for name, least in (("tinit", 0), ("tfinal", 0), ("deltaT", 1)):
            check_whole(self, name, least=least)
        for name in ("beta1", "beta2"):
            check_number(self, name, above=0, below=1)
        check_number(self, "orth_reg_weight", least=0)
        for name in ("squared_penalty", "scale_by_rank"):
            check_choice(self, name, (True, False))
        if self.total_step is not None:
            check_length(self, self.tinit + self.tfinal)

    @property
    def scaling(self) -> float:
        """The factor s of P Λ Q, as long as it doesn't follow the rank."""
        return self.lora_alpha / self.init_r

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, give its target modules their triplets, and return it.

        Raises: ValueError without total_step, if the name is in use, a module doesn't exist, or a layer can't be
            adapted or is smaller than init_r. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            if self.total_step is None:
                raise ValueError(
                    "total_step is None; AdaLoRA must know how many steps fit will take: total_step=…"
                )
            generator = torch.Generator().manual_seed(self.init_seed)
            factors = partial(draw_triplets, r=self.init_r, generator=generator)
            add_lowrank(new, model, factors, Triplets, rank="init_r", scale_by_rank=self.scale_by_rank)
            new.add(Importances(model, name, of_kind(new.parts, Triplets)))
            new.add(step_counter(model, COUNTER, name))
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: Σ r · (in + out + 1) over the targets, and modules_to_save."""
        return count_lowrank(model, self, lambda n_in, n_out: self.init_r * (n_in + n_out + 1), rank="init_r")

    def ranks(self, model: nn.Module) -> dict[str, int]:
        """How many triplets each layer has been given, by its name in the model."""
        return ranks_of(attachments_of(model, self))

    def budget(self, step: int, layers: int) -> int:
        """How many triplets all layers have together after a step, counted from 0: cubic between tinit and tfinal."""
        assert self.total_step is not None
        first, last = self.init_r * layers, self.target_r * layers
        left = 1 - (step - self.tinit) / (self.total_step - self.tfinal - self.tinit)
        if step >= self.total_step - 1:  # with tfinal = 0 the released codes end a step too early
            left = 0
        return int((first - last) * min(max(left, 0), 1) ** 3 + last)

    def penalty(self, model: nn.Module) -> Tensor:
        """What is added to the loss to keep the rows of Q and the columns of P orthogonal."""
        triplets = [part.triplets for a in learning(model, self) for part in of_kind(a.parts, Triplets)]
        if not triplets or not self.orth_reg_weight:
            return torch.zeros((), requires_grad=True)
        norms = off_orthogonal_norms([Q for _, Q, _ in triplets], [P for _, _, P in triplets])
        return self.orth_reg_weight * (norms.square().sum() if self.squared_penalty else norms.mean())

    def after_step(self, model: nn.Module, step: int) -> None:
        """Learn from the step what counts, and give out the ranks where that is due."""
        for attachment in learning(model, self):
            self._allocate(attachment.parts, steps_of(model, COUNTER, attachment.name))

    def _allocate(self, parts: list[Part], counter: Tensor) -> None:
        assert self.total_step is not None
        step, fixed_from = int(counter), self.total_step - self.tfinal
        counter += 1
        layers, (importances,) = of_kind(parts, Triplets), of_kind(parts, Importances)
        if step < fixed_from:
            importances.learn(self.beta1, self.beta2)
        due = step >= self.tinit and (step % self.deltaT == 0 or step == self.total_step - 1)
        if (due and step < fixed_from) or step == fixed_from:
            scores = importances.scores()
            # A loaded adapter that has learned none keeps what it has.
            if scores.any():
                keep_highest(layers, scores, self.budget(step, len(layers)))
        if due or step >= fixed_from:
            for layer in layers:
                layer.cut()

    def unfinished(self, model: nn.Module) -> str | None:
        """Whether the budget has come down to its target, and if not, why."""
        for attachment in learning(model, self):
            layers, done = of_kind(attachment.parts, Triplets), steps_of(model, COUNTER, attachment.name)
            if words := behind(self, len(layers), int(done), self.total_step or 0):
                return words
        return None
