"""Linear probe: the model stays as it is, and only a new head on top of it trains."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.freezing import train_fully
from pefttutor.parts.settings import check_names

__all__ = ["LinearProbe"]


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """Train the head alone, by gradient steps: as much of what a linear map can read off the features as these reach.

    After a few hundred steps that may be far from all of it. The head trained to the end, in seconds, and so the
    yardstick for "does one have to adapt inside?", is `pefttutor.fit_head`.

    >>> model = nn.ModuleDict({"body": nn.Linear(6, 4), "classifier": nn.Linear(4, 2)})
    >>> [name for name, parameter in LinearProbe().attach(model).named_parameters() if parameter.requires_grad]
    ['classifier.weight', 'classifier.bias']

    modules_to_save: the head, which is called "score" or "classifier" in a classifier of transformers.

    Shapes: features (…, d) → scores (…, classes).
    Cost: it trains classes · (d + 1) values, without a backward pass below the head. There is nothing to merge.
    Raises: ValueError for a model without such a head.
    Source: the survey's linear probe; Alain & Bengio 2016, arXiv:1610.01644.
    """

    modules_to_save: Collection[str] = ("classifier",)

    def __post_init__(self) -> None:
        check_names(self, "modules_to_save")
        if not self.modules_to_save:
            raise ValueError(
                "modules_to_save is empty; name the head, such as ('classifier',) or ('score',)."
            )

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model` but for its head and return it. Raises: ValueError if the name is in use."""
        with attaching(model, self, name) as new:
            for part in train_fully(model, (), self.modules_to_save):
                new.add(part)
        return model
