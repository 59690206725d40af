"""COLA: a chain of LoRAs, each trained by an optimizer of its own and merged before the next is begun.

    W_k = W_{k−1} + s · B_k A_k          s = lora_alpha / r,  k = 1 … M,  rank(W_M − W₀) ≤ M · r

What ReLoRA does to train a model from its start, COLA does to fine-tune one: a link of the chain learns what the links
before it have left over. Nothing of the last link's optimizer is kept, neither moments nor the count of its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pefttutor.method import DEFAULT, attaching, learning
from pefttutor.parts.added import steps_of
from pefttutor.parts.lowrank_targets import check_lowrank, count_lowrank
from pefttutor.parts.restarting import add_restarting, merge_due, not_merged
from pefttutor.parts.settings import check_whole

__all__ = ["COLA"]

COUNTER = "cola_step"


@dataclass(frozen=True, kw_only=True)
class COLA:
    """Chain of low-rank adaptations of linear layers and GPT-2's Conv1D.

    y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ;   every link_steps steps W ← W + s · B A, and a new A, B and optimizer

    >>> method = COLA(r=1, link_steps=2, target_modules=("0",))
    >>> model = method.attach(nn.Sequential(nn.Linear(4, 4)))
    >>> before, how = model[0].weight.clone(), {"loss": lambda m, b: m(b["x"]).square().mean(), "lr": 0.1}
    >>> import pefttutor
    >>> _ = pefttutor.fit(model, [{"x": row} for row in torch.eye(4)], steps=6, progress=False, **how)
    >>> int(torch.linalg.matrix_rank(model[0].weight - before, tol=1e-5))            # three links of rank 1
    3

    link_steps: how many steps each link trains; they are counted across calls of `fit`. A training of no more steps is
        LoRA's.
    r, lora_alpha, target_modules, lora_dropout, modules_to_save, init_seed: as in LoRA.

    `fit` asks for the optimizer by itself; give it to a Trainer with optimizers=(method.optimizer(…), None). The
    learning rate goes on as its schedule says.

    The targets' weights are written, so an adapter file holds them whole, and `detach` puts them back from a copy in
    main memory, bit for bit. Half-precision weights round every merge.

    Shapes: A (r, in), B (out, r).
    Cost: LoRA's (`count`); a merge takes 2·r·in·out FLOPs a layer and a moment with a matrix as large as its weight.
    Raises: ValueError for a value that makes no sense, before anything is changed.
    Source: Xia et al. 2024, arXiv:2401.04151.
    """

    r: int = 8
    lora_alpha: float = 16
    target_modules: str | Collection[str] = ("q_proj", "v_proj")
    lora_dropout: float = 0.0
    link_steps: int = 1000
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_lowrank(self)
        check_whole(self, "link_steps")

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
        """AdamW that forgets all it knows of what this method trains where a link ends."""
        mine, trained = learning(model, self), [p for p in model.parameters() if p.requires_grad]
        if not mine:
            return torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
        return ForgettingAdamW(
            trained, links=mine[0].trained(), counter=steps_of(model, COUNTER, mine[0].name),
            every=self.link_steps, lr=lr, weight_decay=weight_decay,
        )  # fmt: skip

    def after_step(self, model: nn.Module, step: int) -> None:
        """Count, and tie a knot where a link ends."""
        for attachment in learning(model, self):
            merge_due(model, attachment, COUNTER, self.link_steps)

    def unfinished(self, model: nn.Module) -> str | None:
        """Whether a link was ended."""
        reasons = [not_merged(model, a, COUNTER, "link_steps") for a in learning(model, self)]
        return next(filter(None, reasons), None)


class ForgettingAdamW(torch.optim.AdamW):
    """AdamW that is as new for some parameters, the links, after every so many steps, which somebody else counts."""

    def __init__(
        self, params: Any, *, links: Iterable[torch.Tensor], counter: torch.Tensor, every: int, **how: Any
    ) -> None:
        super().__init__(params, **how)
        self.links, self.counter, self.every = list(links), counter, every

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        if (int(self.counter) + 1) % self.every == 0:
            for parameter in self.links:
                self.state.pop(parameter, None)
        return loss
