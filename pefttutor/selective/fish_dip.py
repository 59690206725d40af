"""Fish-Dip: a FISH mask that follows the examples the model still finds hard."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pefttutor.method import DEFAULT, attached
from pefttutor.parts.choosing_again import rechoose
from pefttutor.parts.entries import candidates, train_entries
from pefttutor.parts.information import example_losses, fisher_information
from pefttutor.parts.ranking import exact_share, largest_share, without_values
from pefttutor.parts.settings import check_examples, check_fraction, check_names, check_whole

__all__ = ["FishDip"]


@dataclass(frozen=True, kw_only=True)
class FishDip:
    """Choose by Fisher information on the hardest examples, train for a while, and choose again.

        method.attach(model, examples)
        for _ in range(rounds):
            pefttutor.fit(model, examples, steps=100)       # the authors' interval
            method.refresh(model, examples)

    >>> examples = [{"x": Tensor([9.0, 0.0])}, *({"x": Tensor([0.0, 1.0])} for _ in range(3))]   # one easy, three hard
    >>> model, log_likelihood = nn.Linear(2, 1, bias=False), lambda model, batch: model(batch["x"]).sum(1)
    >>> _ = nn.init.ones_(model.weight)
    >>> FishDip(fraction=0.5).masks(model, examples, log_likelihood=log_likelihood)         # the three choose
    {'weight': tensor([[False,  True]])}

    fraction: share of the entries, over all tensors but `modules_to_save`, that train at a time.
    hardest, share: how many of the n examples choose, those with the largest loss: min(hardest, share · n), but at
        least 3.
    modules_to_save: modules that train fully and are saved along, such as a new head.

    What was trained before a refresh stays as it became. Each `fit` starts with a fresh optimizer. Only the last
    choice is saved, so save the whole model if it was refreshed.

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
        check_fraction(self)
        check_names(self, "modules_to_save")
        check_fraction(self, "share")
        check_whole(self, "hardest")

    def attach(
        self, model: nn.Module, examples: Sequence[Any] | None = None, *, name: str = DEFAULT, **how: Any
    ) -> nn.Module:
        """Choose entries by the hardest `examples`, freeze the others, and return `model`.

        `how`: see `fisher_information`. Raises: ValueError if the name is in use, or there are no examples or labels.
        """
        return train_entries(model, self, self.masks(model, examples, **how), self.modules_to_save, name=name)

    def refresh(
        self, model: nn.Module, examples: Sequence[Any], *, name: str | None = None, **how: Any
    ) -> nn.Module:
        """Choose again, for the model as it is now. `name` says which FishDip is meant, where there are several.

        Raises: RuntimeError if no FishDip is attached; ValueError without examples or labels; FloatingPointError if
            a loss or gradient isn't finite. The choice then stays as it was.
        """
        mine = [
            a for a in attached(model).values() if isinstance(a.method, FishDip) and name in (None, a.name)
        ]
        if len(mine) != 1:
            raise RuntimeError(
                f"refresh needs one FishDip attached, and the model has {attached(model) or 'nothing'}."
            )
        check_examples(self, examples, labels=not how)
        rechoose(model, mine[0], lambda: self.masks(model, examples, **how))
        return model

    def masks(self, model: nn.Module, examples: Sequence[Any] | None, **how: Any) -> dict[str, Tensor]:
        """What would be chosen, by the name of each tensor; changes nothing."""
        tensors = candidates(model, self.modules_to_save)
        if without_values(tensors):
            return largest_share(tensors, self.fraction)
        examples = check_examples(self, examples, labels=not how)
        count = max(3, min(self.hardest, int(exact_share(self.share, len(examples)))))
        order = example_losses(model, examples, **how).argsort(descending=True, stable=True)[:count]
        scores = fisher_information(model, [examples[int(i)] for i in order], **how)
        return largest_share({name: scores[name] for name in tensors}, self.fraction)
