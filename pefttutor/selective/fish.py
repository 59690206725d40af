"""FISH mask: train the entries with the largest Fisher information, chosen once.

M_i = 1 for the k largest F_i          (Fisher-Induced Sparse unCHanging mask)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pefttutor.parts import entries
from pefttutor.parts.information import fisher_information
from pefttutor.parts.ranking import check_examples, exact_share, without_values

__all__ = ["FishMask"]


@dataclass(frozen=True, kw_only=True)
class FishMask:
    """Choose by Fisher information on a few examples; then train these entries, as `SparseFineTuning` does.

    fraction: share of all the model's entries that train, the head included: k = ⌊fraction · N⌋ − |head|.
    samples: how many examples are used for choosing.
    expected: the true Fisher information, over the model's own labels, in place of the empirical.
    modules_to_save: the head, which trains fully, counted in the budget, and takes no part in the choice.

    Cost: choosing costs about one epoch over `samples` (see `fisher_information`).
    Raises: ValueError for a fraction outside (0, 1], or so small that the head alone exceeds it.
    Source: Sung et al. 2021, arXiv:2111.09839; chapter 4.3.1.
    """

    fraction: float = 0.005
    samples: int = 1024
    expected: bool = False
    modules_to_save: Collection[str] = ()

    def __post_init__(self) -> None:
        entries.check_fraction(self)
        if not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"samples is {self.samples!r}; it must be a whole number ≥ 1.")

    def attach(self, model: nn.Module, examples: Sequence[Any] | None = None, **how: Any) -> nn.Module:
        """Choose entries by `examples`, freeze the others, and return `model`. `how`: see `fisher_information`.

        Raises: RuntimeError if it is adapted already; ValueError without examples or labels.
        """
        return entries.train_entries(model, self, self.masks(model, examples, **how), self.modules_to_save)

    def masks(self, model: nn.Module, examples: Sequence[Any] | None, **how: Any) -> dict[str, Tensor]:
        """What would be chosen, by the name of each tensor; changes nothing."""
        tensors = entries.candidates(model, self.modules_to_save)
        everything = sum(p.numel() for p in model.parameters())
        head = everything - sum(p.numel() for p in tensors.values())
        k = int(exact_share(self.fraction, everything)) - head
        if k < 1:
            raise ValueError(
                f"FishMask: fraction={self.fraction} of {everything:,} entries leaves {k} beside the head's {head:,}; "
                f"take at least {(head + 1) / everything:.2g}."
            )
        if without_values(tensors):
            return entries.largest(tensors, k)
        examples = check_examples(self, examples, labels=False)
        scores = fisher_information(model, examples, samples=self.samples, expected=self.expected, **how)
        return entries.largest({name: scores[name] for name in tensors}, k)

    after_step, restore, loaded = entries.after_step, entries.restore, entries.loaded
