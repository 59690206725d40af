"""Child-Tuning: update a part of the network in each step, drawn at random (F) or chosen by the task (D).

w ← w − η · g ⊙ M                                                              (4.6)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.method import DEFAULT, attaching, trained_by
from pefttutor.parts.entries import candidates, train_entries
from pefttutor.parts.freezing import train_everything
from pefttutor.parts.information import fisher_information
from pefttutor.parts.ranking import largest_share, without_values
from pefttutor.parts.settings import check_examples, check_fraction, check_names, check_whole

__all__ = ["ChildTuningD", "ChildTuningF"]


@dataclass(frozen=True, kw_only=True)
class ChildTuningF:
    """Full fine-tuning with a random part of the gradient in each step: a regulariser, not a saving.

    g ← g ⊙ M / p_F,   M ~ Bernoulli(p_F), fresh in each step

    >>> layer = nn.Linear(8, 8)
    >>> layer.weight.grad = torch.ones(8, 8)
    >>> ChildTuningF(p_F=0.25).after_backward(layer, step=0)
    >>> layer.weight.grad.unique()                                      # dropped, or divided by p_F
    tensor([0., 4.])

    p_F: chance of an entry to keep its gradient. Dividing by it makes the expected gradient that of full
        fine-tuning; the chapter's eq. 4.6 and 4.7 leave it out, the authors' code has it.
    seed: fixes the masks. A step's masks depend on the seed and the step alone, so an interrupted run can go on.

    All gradients are computed, all entries have optimizer state, and momentum and weight decay move every entry in
    every step: this is noise on the gradient, as published. With p_F = 1 it is full fine-tuning.

    Cost: that of full fine-tuning, and one random draw for each entry in each step.
    Raises: ValueError for p_F outside (0, 1].
    Source: Xu et al. 2021, arXiv:2109.05687, eq. 1; chapter eq. 4.6 and 4.7.
    """

    p_F: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        check_fraction(self, "p_F")
        check_whole(self, "seed", least=0)

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Let every parameter of `model` train and return it. Raises: ValueError if the name is in use."""
        with attaching(model, self, name) as new:
            new.add(train_everything(model))
        return model

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Keep each gradient entry with probability p_F, divided by p_F."""
        if self.p_F == 1:
            return
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * step)
        for p in trained_by(model, self):
            if p.grad is not None:
                keep = torch.rand(p.shape, generator=generator) < self.p_F
                p.grad.mul_(keep.to(p.grad.device)).div_(self.p_F)


@dataclass(frozen=True, kw_only=True)
class ChildTuningD:
    """Train the entries with the largest Fisher information on the task; the mask is the same in all steps.

    M_i = 1 for the k largest F_i,   k = ⌊p_D · n⌋

    >>> examples = [{"x": Tensor([3.0, 1.0])}, {"x": Tensor([-3.0, 1.0])}]      # Σ g² is 18 and 2
    >>> log_likelihood = lambda model, batch: model(batch["x"]).sum(1)
    >>> ChildTuningD(p_D=0.5).masks(nn.Linear(2, 1, bias=False), examples, log_likelihood=log_likelihood)
    {'weight': tensor([[ True, False]])}

    p_D: share of the entries that train, over all tensors but `modules_to_save`. p_D = 1 is full fine-tuning.
    samples: how many examples are used for choosing; None takes all, as eq. 4.9 says.
    modules_to_save: modules that train fully, such as a new head ("classifier").

    The entries outside never move: the optimizer doesn't see them. (The authors' code masks gradients before a
    dense Adam, whose momentum and weight decay move them, and squares the gradient of a batch in place of each
    example's.)

    Cost: choosing costs about one epoch; training costs what it does in `SparseFineTuning`.
    Raises: ValueError for p_D outside (0, 1].
    Source: Xu et al. 2021, arXiv:2109.05687, eq. 5 and 6; chapter eq. 4.8 and 4.9.
    """

    p_D: float = 0.3
    samples: int | None = None
    modules_to_save: Collection[str] = ()

    def __post_init__(self) -> None:
        check_fraction(self, "p_D")
        check_names(self, "modules_to_save")

    def attach(
        self, model: nn.Module, examples: Sequence[Any] | None = None, *, name: str = DEFAULT, **how: Any
    ) -> nn.Module:
        """Choose entries by `examples`, freeze the others, and return `model`. `how`: see `fisher_information`.

        Raises: ValueError if the name is in use, or there are no examples or labels.
        """
        return train_entries(model, self, self.masks(model, examples, **how), self.modules_to_save, name=name)

    def masks(self, model: nn.Module, examples: Sequence[Any] | None, **how: Any) -> dict[str, Tensor]:
        """What would be chosen, by the name of each tensor; changes nothing."""
        tensors = candidates(model, self.modules_to_save)
        if without_values(tensors):
            return largest_share(tensors, self.p_D)
        examples = check_examples(self, examples, labels=False)
        scores = fisher_information(model, examples, samples=self.samples, **how)
        return largest_share({name: scores[name] for name in tensors}, self.p_D)
