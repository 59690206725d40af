"""FISH mask: train the entries with the largest Fisher information, chosen once.

M_i = 1 for the k largest F_i          (Fisher-Induced Sparse unCHanging mask)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pefttutor.method import DEFAULT
from pefttutor.parts.entries import candidates, train_entries
from pefttutor.parts.information import fisher_information
from pefttutor.parts.ranking import exact_share, largest, without_values
from pefttutor.parts.settings import check_examples, check_fraction, check_names, check_whole

__all__ = ["FishMask"]


@dataclass(frozen=True, kw_only=True)
class FishMask:
    """Choose by Fisher information on a few examples; then train these entries, as `SparseFineTuning` does.

    F_i is the mean over the examples of the squared gradient of log p(y | x), each example squared on its own.

    >>> examples = [{"x": Tensor([3.0, 1.0])}, {"x": Tensor([-3.0, 1.0])}]      # Σ g² is 18 and 2
    >>> log_likelihood = lambda model, batch: model(batch["x"]).sum(1)
    >>> FishMask(fraction=0.5).masks(nn.Linear(2, 1, bias=False), examples, log_likelihood=log_likelihood)
    {'weight': tensor([[ True, False]])}

    fraction: share of all the model's entries that train, the head included: k = ⌊fraction · N⌋ − |head|.
    samples: how many examples are used for choosing.
    expected: take the true Fisher information, over the labels that the model itself expects, in place of the
        empirical one.
    modules_to_save: the head; it trains fully, counts in the budget, and takes no part in the choice.

    Cost: choosing costs about one epoch over `samples` (see `fisher_information`); training costs what it does in
        `SparseFineTuning`.
    Raises: ValueError for a fraction outside (0, 1], or so small that the head alone exceeds it.
    Source: Sung et al. 2021, arXiv:2111.09839; chapter 4.3.1.
    """

    fraction: float = 0.005
    samples: int = 1024
    expected: bool = False
    modules_to_save: Collection[str] = ()

    def __post_init__(self) -> None:
        check_fraction(self)
        check_names(self, "modules_to_save")
        check_whole(self, "samples")

    def attach(
        self, model: nn.Module, examples: Sequence[Any] | None = None, *, name: str = DEFAULT, **how: Any
    ) -> nn.Module:
        """Choose entries by `examples`, freeze the others, and return `model`. `how`: see `fisher_information`.

        Raises: ValueError if the name is in use, or there are no examples or labels.
        """
        return train_entries(model, self, self.masks(model, examples, **how), self.modules_to_save, name=name)

    def masks(self, model: nn.Module, examples: Sequence[Any] | None, **how: Any) -> dict[str, Tensor]:
        """What would be chosen, by the name of each tensor; changes nothing."""
        tensors, with_head = candidates(model, self.modules_to_save), candidates(model)
        everything = sum(p.numel() for p in with_head.values())
        head = everything - sum(p.numel() for p in tensors.values())
        k = int(exact_share(self.fraction, everything)) - head
        if k < 1:
            raise ValueError(
                f"FishMask: fraction={self.fraction} of {everything:,} entries leaves {k} beside the head's {head:,}; "
                f"take at least {(head + 1) / everything:.2g}."
            )
        if without_values(tensors):
            return largest(tensors, k)
        examples = check_examples(self, examples, labels=False)
        scores = fisher_information(model, examples, samples=self.samples, expected=self.expected, **how)
        return largest({name: scores[name] for name in tensors}, k)
