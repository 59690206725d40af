"""What the methods with thin factors share: are the settings right, which layers, how many values, and attaching."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pefttutor.parts.attachment import Attachment
from pefttutor.parts.freezing import fully_trained, train_fully
from pefttutor.parts.linear import sizes
from pefttutor.parts.lowrank_layer import LowRank
from pefttutor.parts.modules import linear_targets
from pefttutor.parts.settings import check_names, check_number, check_whole

__all__ = ["add_lowrank", "check_lowrank", "count_lowrank", "lowrank_targets", "scaling_of"]


def check_lowrank(method: Any, *, rank: str = "r", seeded: bool = True) -> None:
    """Raise ValueError unless the fields that these methods share make sense.

    rank: the name of the rank's field. seeded: whether the method draws at random.
    """
    check_whole(method, rank)
    check_number(method, "lora_alpha", above=0, hint=f" (usual: {rank} or 2·{rank})")
    check_number(method, "lora_dropout", least=0, below=1)
    if seeded:
        check_whole(method, "init_seed", least=0)
    check_names(method, "target_modules", "modules_to_save")


def scaling_of(method: Any) -> float:
    """The factor s of B A: lora_alpha / r, or lora_alpha / √r with `use_rslora`."""
    return method.lora_alpha / (math.sqrt(method.r) if method.use_rslora else method.r)


def lowrank_targets(model: nn.Module, method: Any, *, rank: str = "r") -> dict[str, nn.Module]:
    """The layers that the method's `target_modules` means, by name.

    Raises: ValueError as `linear_targets`, and for a layer that is smaller than the rank.
    """
    r = getattr(method, rank)
    targets = linear_targets(model, method.target_modules, method.modules_to_save)
    for path, layer in targets.items():
        n_in, n_out = sizes(layer)
        if r > min(n_in, n_out):
            raise ValueError(
                f"{rank} is {r}, but {path!r} maps {n_in} to {n_out}: {rank} must be at most {min(n_in, n_out)}."
            )
    return targets


def count_lowrank(
    model: nn.Module, method: Any, values: Callable[[int, int], int], *, rank: str = "r"
) -> int:
    """How many values train: values(in, out) of each target, and all of the method's `modules_to_save`."""
    targets = lowrank_targets(model, method, rank=rank)
    fully, _ = fully_trained(model, method.modules_to_save)
    added = sum(values(*sizes(layer)) for layer in targets.values())
    return added + sum(model.get_parameter(name).numel() for name in fully)


def add_lowrank(
    new: Attachment,
    model: nn.Module,
    factors: Callable[[nn.Module], tuple[Tensor, Tensor]],
    kind: Callable[..., LowRank] = LowRank,
    *,
    rank: str = "r",
    **how: Any,
) -> None:
    """Take in a change of each target and what trains `modules_to_save`, by the settings of the attachment's method.

    factors: of a layer, A and B as they start. kind: of change; how: what this kind asks for beside the usual.
    """
    method = new.method
    for path, layer in lowrank_targets(model, method, rank=rank).items():
        new.add(
            kind(
                path,
                layer,
                new.name,
                factors(layer),
                scaling=method.scaling,
                dropout=method.lora_dropout,
                **how,
            )
        )
    for part in train_fully(model, (), method.modules_to_save):
        new.add(part)
