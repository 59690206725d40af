"""What the methods with thin factors ask before they attach: are the settings right, which layers, how many values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from pefttutor.parts.freezing import fully_trained
from pefttutor.parts.linear import sizes
from pefttutor.parts.modules import linear_targets
from pefttutor.parts.settings import check_names, check_number, check_whole

__all__ = ["check_lowrank", "count_lowrank", "lowrank_targets"]


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
