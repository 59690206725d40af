"""ReLoRA: a chain of LoRAs, each merged into the weight before the next begins, so that the ranks add up.

    W_k = W_{k−1} + s · B_k A_k          s = lora_alpha / r,  rank(W_n − W₀) ≤ n · r

A merge changes nothing of the function: A is drawn anew, B is zero. But the optimizer remembers where the last A and B
were going, and would lead the new ones there; so most of its moments are cut, and the learning rate rises from zero.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from pefttutor.method import DEFAULT, attaching, learning
from pefttutor.parts.added import steps_of
from pefttutor.parts.lowrank_targets import check_lowrank, count_lowrank
from pefttutor.parts.part import of_kind
from pefttutor.parts.restarting import Restarting, RestartingAdamW, add_restarting, merge_due, not_merged
from pefttutor.parts.settings import check_number, check_whole

__all__ = ["ReLoRA"]

COUNTER = "relora_step"


@dataclass(frozen=True, kw_only=True)
class ReLoRA:
    """Low-rank adaptation of linear layers and GPT-2's Conv1D that merges and restarts while it trains.

    y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ;   every reset_every steps W ← W + s · B A, A ← drawn anew, B ← 0

    >>> method = ReLoRA(r=1, reset_every=2, restart_warmup_steps=1, target_modules=("0",))
    >>> model = method.attach(nn.Sequential(nn.Linear(4, 4)))
    >>> before, how = model[0].weight.clone(), {"loss": lambda m, b: m(b["x"]).square().mean(), "lr": 0.1}
    >>> import pefttutor
    >>> _ = pefttutor.fit(model, [{"x": row} for row in torch.eye(4)], steps=6, progress=False, **how)
    >>> int(torch.linalg.matrix_rank(model[0].weight - before, tol=1e-5))            # three merges of rank 1
    3

    reset_every: steps between merges; the steps are counted across calls of `fit`.
    optimizer_magnitude_pruning: the share of the factors' first moments that a merge sets to zero, the smallest ones,
        and the second moments at the same places. (The released code cuts each by its own order; where a mean outlives
        its mean square the next step is as long as that mean divided by epsilon.)
    restart_warmup_steps: over how many steps the learning rate rises again after a merge.
    r, lora_alpha, target_modules, lora_dropout, modules_to_save, init_seed: as in LoRA.

    It was made for training from the start, after some steps of full training; there embeddings, norms and head train
    fully (`modules_to_save`). `fit` asks for the optimizer by itself; give it to a Trainer with
    optimizers=(method.optimizer(…), None). (The released wrapper starts with A and B zero, so that nothing is learned
    until the first merge; here A starts as in LoRA.)

    The targets' weights are written, so an adapter file holds them whole, and `detach` puts them back from a copy in
    main memory, bit for bit. Half-precision weights round every merge.

    Shapes: A (r, in), B (out, r).
    Cost: LoRA's (`count`); a merge takes 2·r·in·out FLOPs a layer and a moment with a matrix as large as its weight.
    Raises: ValueError for a value that makes no sense, before anything is changed.
    Source: Lialin et al. 2023, arXiv:2307.05695, algorithm 1 and section 3.
    """

    r: int = 8
    lora_alpha: float = 16
    target_modules: str | Collection[str] = ("q_proj", "v_proj")
    lora_dropout: float = 0.0
    reset_every: int = 1000
    optimizer_magnitude_pruning: float = 0.9
    restart_warmup_steps: int = 50
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_lowrank(self)
        check_whole(self, "reset_every")
        check_whole(self, "restart_warmup_steps", least=0)
        check_number(self, "optimizer_magnitude_pruning", least=0)
        if self.optimizer_magnitude_pruning > 1:
            raise ValueError(
                f"optimizer_magnitude_pruning is {self.optimizer_magnitude_pruning!r}; it is a share, at most 1."
            )

    @property
    def scaling(self) -> float:
        """The factor s of B A."""
        return self.lora_alpha / self.r

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, give its target modules the two factors, and return it.

        Raises: ValueError if the name is in use, a module doesn't exist, a layer can't be adapted or is smaller than
            r, or its weight can't be written to, for it is quantised, or shared. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            add_restarting(new, model, COUNTER)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: Σ r · (in + out) over the targets, and modules_to_save."""
        return count_lowrank(model, self, lambda n_in, n_out: self.r * (n_in + n_out), words=False)

    def optimizer(self, model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """AdamW that takes part in the restarts."""
        mine = learning(model, self)
        factors = [p for a in mine for part in of_kind(a.parts, Restarting) for p in part.trained()]
        trained = [p for p in model.parameters() if p.requires_grad]
        if not mine:
            return torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
        return RestartingAdamW(
            trained, factors=factors, counter=steps_of(model, COUNTER, mine[0].name),
            every=self.reset_every, warmup=self.restart_warmup_steps, cut=self.optimizer_magnitude_pruning,
            lr=lr, weight_decay=weight_decay,
        )  # fmt: skip

    def after_step(self, model: nn.Module, step: int) -> None:
        """Count, and merge where that is due."""
        for attachment in learning(model, self):
            merge_due(model, attachment, COUNTER, self.reset_every)

    def unfinished(self, model: nn.Module) -> str | None:
        """Whether anything was merged."""
        reasons = [not_merged(model, a, COUNTER, "reset_every") for a in learning(model, self)]
        return next(filter(None, reasons), None)
