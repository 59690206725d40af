"""Train the last blocks only. The blocks below are then a fixed function, whose outputs can be kept."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.blocks import blocks
from pefttutor.parts.freezing import train_fully
from pefttutor.parts.ranking import exact_share
from pefttutor.parts.settings import check_fraction, check_names

__all__ = ["LastLayers"]


@dataclass(frozen=True, kw_only=True)
class LastLayers:
    """Freeze the embeddings and the first blocks; train the last ⌈fraction · L⌉ of L blocks.

    >>> model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(2, 2) for _ in range(8))})
    >>> LastLayers(fraction=0.25).count(model)                          # the last 2 of 8 blocks, 6 values in each
    12

    fraction: a quarter is what Lee et al. report to reach 90 % of full fine-tuning's gain on BERT and RoBERTa.
    modules_to_save: modules that train fully and are saved along, such as a new head ("classifier").

    Nothing below the first trained block needs a backward pass, nor even a second forward pass: see `CachedPrefix`.

    Cost: it trains about that fraction of the blocks' values; the forward pass runs in full, the backward pass in the
        last blocks only.
    Raises: ValueError for a fraction outside (0, 1] or a model without a list of blocks.
    Source: Lee et al. 2019, arXiv:1911.03090; chapter 4.3.1.
    """

    fraction: float = 0.25
    modules_to_save: Collection[str] = ()

    def __post_init__(self) -> None:
        check_fraction(self)
        check_names(self, "modules_to_save")

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model` but for its last blocks and return it. Raises: ValueError if the name is in use."""
        with attaching(model, self, name) as new:
            for part in train_fully(model, self._names(model), self.modules_to_save):
                new.add(part)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values of the blocks train, without `modules_to_save`."""
        names = self._names(model)
        return sum(p.numel() for name, p in model.named_parameters() if name in names)

    def _names(self, model: nn.Module) -> list[str]:
        path, layers = blocks(model)
        first = len(layers) - math.ceil(exact_share(self.fraction, len(layers)))
        last = tuple(f"{path}.{i}." for i in range(first, len(layers)))
        return [name for name, _ in model.named_parameters() if name.startswith(last)]
