"""What the methods with thin factors share: are the settings right, which layers, how many values, and attaching."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from pefttutor.parts.attachment import Attachment
from pefttutor.parts.freezing import fully_trained, train_fully
from pefttutor.parts.linear import sizes, why_not_linear
from pefttutor.parts.lowrank_layer import LowRank
from pefttutor.parts.modules import linear_targets
from pefttutor.parts.settings import check_choice, check_names, check_number, check_whole
from pefttutor.parts.weight_delta import WeightDelta

__all__ = ["add_lowrank", "check_lowrank", "count_lowrank", "lowrank_targets", "scaling_of"]


def check_lowrank(
    method: Any,
    *,
    rank: str = "r",
    alpha: str | None = "lora_alpha",
    dropout: str | None = "lora_dropout",
    seed: str | None = "init_seed",
) -> None:
    """Raise ValueError unless the fields that these methods share make sense.

    rank, alpha, dropout, seed: what the method calls them; None for what it doesn't have.
    """
    check_whole(method, rank)
    if alpha:
        check_number(method, alpha, above=0, hint=f" (usual: {rank} or 2·{rank})")
    if dropout:
        check_number(method, dropout, least=0, below=1)
    if seed:
        check_whole(method, seed, least=0)
    if hasattr(method, "use_rslora"):
        check_choice(method, "use_rslora", (True, False))
    check_names(method, "target_modules", "modules_to_save")


def scaling_of(method: Any) -> float:
    """The factor s of B A: lora_alpha / r, or lora_alpha / √r with `use_rslora`."""
    return method.lora_alpha / (math.sqrt(method.r) if method.use_rslora else method.r)


def lowrank_targets(
    model: nn.Module, method: Any, *, rank: str | None = "r", words: bool = True
) -> dict[str, nn.Module]:
    """The layers that the method's `target_modules` means, by name.

    rank: the field that no layer may be smaller than; None for a method that has no such bound. words: whether it
    takes embeddings.

    Raises: ValueError as `linear_targets`, and for a layer that is smaller than the rank.
    """

    def why_not(layer: nn.Module) -> str | None:
        refused = isinstance(layer, nn.Embedding) and not words
        return f"{type(method).__name__} takes no embedding" if refused else why_not_linear(layer)

    targets = linear_targets(model, method.target_modules, method.modules_to_save, why_not=why_not)
    for path, layer in targets.items():
        n_in, n_out = sizes(layer)
        if rank and getattr(method, rank) > min(n_in, n_out):
            raise ValueError(
                f"{rank} is {getattr(method, rank)}, but {path!r} maps {n_in} to {n_out}: {rank} must be at most "
                f"{min(n_in, n_out)}."
            )
    return targets


def count_lowrank(model: nn.Module, method: Any, values: Callable[[int, int], int], **which: Any) -> int:
    """How many values train: values(in, out) of each target, and all of the method's `modules_to_save`.

    which: as for `lowrank_targets`.
    """
    targets = lowrank_targets(model, method, **which)
    fully, _ = fully_trained(model, method.modules_to_save)
    added = sum(values(*sizes(layer)) for layer in targets.values())
    return added + sum(model.get_parameter(name).numel() for name in fully)


def add_lowrank(
    new: Attachment,
    model: nn.Module,
    made: Callable[[nn.Module], Any],
    kind: Callable[..., WeightDelta] = LowRank,
    *,
    rank: str | None = "r",
    words: bool = True,
    **how: Any,
) -> None:
    """Take in a change of each target and what trains `modules_to_save`, by the settings of the attachment's method.

    made: of a layer, what a change of this kind starts from: A and B. how: what the kind asks for beside the usual.
    """
    method = new.method
    usual = {
        "scaling": getattr(method, "scaling", 1.0),
        "dropout": getattr(method, "lora_dropout", 0.0),
    }
    for path, layer in lowrank_targets(model, method, rank=rank, words=words).items():
        new.add(kind(path, layer, new.name, made(layer), **(usual | how)))
    for part in train_fully(model, (), method.modules_to_save):
        new.add(part)
