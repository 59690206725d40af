"""Fish-Dip: a FISH mask that follows the examples the model still finds hard."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor import method as base
from pefttutor.data.batches import collator
from pefttutor.data.evaluation import evaluating
from pefttutor.parts import entries
from pefttutor.parts.information import fisher_information
from pefttutor.parts.ranking import check_examples, exact_share, without_values

__all__ = ["FishDip"]


@dataclass(frozen=True, kw_only=True)
class FishDip:
    """Choose by Fisher information on the hardest examples, train for a while, and choose again.

        method.attach(model, examples)
        for _ in range(rounds):
            pefttutor.fit(model, examples, steps=100)       # the authors' interval
            method.refresh(model, examples)

    fraction: share of the entries, over all tensors but `modules_to_save`, that train at a time.
    hardest, share: how many examples with the largest loss choose: min(hardest, share · n), but at least 3.
    modules_to_save: modules that train fully and are saved along, such as a new head.

    What was trained before a refresh stays as it became. Each `fit` starts with a fresh optimizer. Saved is the
    last choice alone, so save the whole model if it was refreshed.

    Cost: a refresh costs a forward pass over all examples and the Fisher information on the hardest.
    Raises: ValueError for a fraction outside (0, 1].
    Source: Das et al. 2023, arXiv:2311.03748, algorithm 1. (Chapter 4.3.2 says "every training epoch"; the authors'
        code, every 100 steps.)
    """

    fraction: float = 0.01
    hardest: int = 25
    share: float = 0.1
    modules_to_save: Collection[str] = ()

    def __post_init__(self) -> None:
        entries.check_fraction(self)
        entries.check_fraction(self, "share")
        if not isinstance(self.hardest, int) or self.hardest < 1:
            raise ValueError(f"hardest is {self.hardest!r}; it must be a whole number ≥ 1.")

    def attach(self, model: nn.Module, examples: Sequence[Any] | None = None) -> nn.Module:
        """Choose entries by the hardest `examples`, freeze the others, and return `model`."""
        return entries.train_entries(model, self, self.masks(model, examples), self.modules_to_save)

    def refresh(self, model: nn.Module, examples: Sequence[Any]) -> nn.Module:
        """Choose again, for the model as it is now.

        Raises: RuntimeError if no FishDip is attached; ValueError without examples or labels, FloatingPointError if
            a loss or gradient isn't finite: then the choice stays as it was.
        """
        method = base.adapted(model)
        if not isinstance(method, FishDip):
            raise RuntimeError(f"refresh needs a FishDip attached, and the model has {method}.")
        check_examples(self, examples)
        kept, described = entries.entries(model), base.described_base(model)
        entries.release(model)
        try:
            return self.attach(model, examples)
        except BaseException:
            entries.train_entries(model, method, kept, method.modules_to_save, described=described)
            raise

    def masks(self, model: nn.Module, examples: Sequence[Any] | None) -> dict[str, Tensor]:
        """What would be chosen, by the name of each tensor; changes nothing."""
        tensors = entries.candidates(model, self.modules_to_save)
        if without_values(tensors):
            return entries.largest_share(tensors, self.fraction)
        examples = check_examples(self, examples)
        count = max(3, min(self.hardest, int(exact_share(self.share, len(examples)))))
        order = losses(model, examples).argsort(descending=True, stable=True)[:count]
        scores = fisher_information(model, [examples[int(i)] for i in order])
        return entries.largest_share({name: scores[name] for name in tensors}, self.fraction)

    after_step, restore, loaded = entries.after_step, entries.restore, entries.loaded


def losses(model: nn.Module, examples: Sequence[Any]) -> Tensor:
    """The loss of each example, in evaluation mode. Shapes: → (n)."""
    stack, device = collator(model), next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        found = [model(**{k: v.to(device) for k, v in stack([example]).items()}).loss for example in examples]
    return torch.stack(found).cpu()
