"""Train the last blocks only. The blocks below are then a fixed function, whose outputs can be kept."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn

from pefttutor.parts.entries import check_fraction, train_tensors
from pefttutor.parts.ranking import exact_share

__all__ = ["LastLayers", "below", "blocks"]


@dataclass(frozen=True, kw_only=True)
class LastLayers:
    """Freeze the embeddings and the first blocks; train the last ⌈fraction · L⌉ of L blocks.

    fraction: a quarter is what Lee et al. report to reach 90 % of full fine-tuning's gain on BERT and RoBERTa.
    modules_to_save: modules that train fully and are saved along, such as a new head ("classifier").

    Nothing below the first trained block needs a backward pass, nor even a second forward pass: see `CachedPrefix`.

    Cost: trains about fraction of the blocks' values; forward in full, backward in the last blocks only.
    Raises: ValueError for a fraction outside (0, 1] or a model without a list of blocks.
    Source: Lee et al. 2019, arXiv:1911.03090; chapter 4.3.1.
    """

    fraction: float = 0.25
    modules_to_save: Collection[str] = ()

    def __post_init__(self) -> None:
        check_fraction(self)

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze `model` but for its last blocks and return it. Raises: RuntimeError if it is adapted already."""
        return train_tensors(model, self, self._names(model), self.modules_to_save)

    def count(self, model: nn.Module) -> int:
        """How many values of blocks train, without `modules_to_save`."""
        names = self._names(model)
        return sum(p.numel() for name, p in model.named_parameters() if name in names)

    def _names(self, model: nn.Module) -> list[str]:
        name, stack = blocks(model)
        first = len(stack) - math.ceil(exact_share(self.fraction, len(stack)))
        last = [f"{name}.{i}." for i in range(first, len(stack))]
        return [n for n, _ in model.named_parameters() if any(n.startswith(start) for start in last)]


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of the model's blocks: the list with most parameters; of two alike, the last.

    Raises: ValueError if there is none.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    if not lists:
        raise ValueError("this model has no list of blocks (an nn.ModuleList with several entries).")
    return max(reversed(lists), key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


def below(model: nn.Module) -> set[Tensor]:
    """The parameters of what comes before the model's blocks: embeddings, their norm, positions, a patch projection.

    On the way from the model to the list of its blocks, that is each module's own parameters and those of the
    modules registered before the next step (an encoder-decoder's encoder, too), but not of one called final or out.
    """
    found: set[Tensor] = set()
    module = model
    for step in blocks(model)[0].split("."):
        children = list(module.named_children())
        before = children[: [name for name, _ in children].index(step)]
        found |= set(module.parameters(recurse=False))
        found |= {p for n, m in before if "final" not in n and "out" not in n for p in m.parameters()}
        module = module.get_submodule(step)
    return found
