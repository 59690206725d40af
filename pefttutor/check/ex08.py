"""Notebook 08, selection by rule: which parameters are biases, which entries are smallest, and a step on them only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.check.compare import same_result
from pefttutor.check.core import exercise
from pefttutor.check.ex08_answers import (
    MASKS_MISTAKES,
    NAMES_MISTAKES,
    STEP_MISTAKES,
    bias_names,
    masked_step,
    smallest_masks,
)
from pefttutor.check.values import draw


class _Block(nn.Module):
    """Names that contain and end like "bias", and layers without one."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(4, 6), nn.Linear(4, 6, bias=False)
        self.relative_bias = nn.Embedding(5, 2)
        self.norm, self.conv = nn.LayerNorm(6), nn.Conv1d(2, 3, 1)
        self.unbias = nn.Parameter(torch.ones(3))


def _small_model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        model = nn.ModuleDict({"embed": nn.Embedding(7, 4)})
        model["layers"] = nn.ModuleList(_Block() for _ in range(2))
        model["score"] = nn.Linear(6, 3)
    return model


def _told(function: Callable[..., Any]) -> Callable[..., Any]:
    """The names, and before them the first that is too many and the first that is missing."""

    def seen(model: nn.Module) -> Any:
        right, came = bias_names(model), function(model=model)
        if not (isinstance(came, list | tuple) and all(isinstance(name, str) for name in came)):
            return came
        return {
            "a name too many": next((name for name in came if name not in right), "none"),
            "a name missing": next((name for name in right if name not in came), "none"),
            "names": came,
        }

    return seen


@exercise("08.1", reference=bias_names)
def ex08_1(attempt: Any) -> None:
    """A model with misleading names; it must come out as it went in."""
    known = {name: _told(mistake) for name, mistake in NAMES_MISTAKES.items()}
    same_result(_told(attempt), _told(bias_names), {"model": _small_model()}, mistakes=known)


def _chosen(function: Callable[..., Any]) -> Callable[..., Any]:
    """How many entries are chosen, and of which sizes: the same whichever of equal ones are."""

    def seen(weights: Mapping[str, Tensor], fraction: float) -> Any:
        masks = function(weights=weights, fraction=fraction)
        if not (isinstance(masks, Mapping) and list(masks) == list(weights)):
            return masks
        if not all(isinstance(m, Tensor) and m.dtype == torch.bool for m in masks.values()):
            return masks
        if any(mask.shape != weights[name].shape for name, mask in masks.items()):
            return masks
        sizes = torch.cat([weights[name].abs()[mask] for name, mask in masks.items()])
        return {"entries chosen": len(sizes), "their sizes": sizes.sort().values}

    return seen


@exercise("08.2", reference=smallest_masks)
def ex08_2(attempt: Any) -> None:
    """Shapes and scales that differ; a quarter of n = 48, 9.6 entries, everything, nothing; then equal values."""
    weights = {"a": draw(5, 3, seed=1), "b": 0.3 * draw(9, seed=2) + 0.2, "c": 2 * draw(2, 4, 3, seed=3)}
    for fraction in (0.25, 0.2, 1.0, 0.01):
        inputs = {"weights": weights, "fraction": fraction}
        same_result(attempt, smallest_masks, inputs, mistakes=MASKS_MISTAKES)
    equal = {"a": torch.ones(2, 4), "b": torch.tensor([3.0, -1.0, 0.5, 1.0])}
    known = {name: _chosen(mistake) for name, mistake in MASKS_MISTAKES.items()}
    inputs = {"weights": equal, "fraction": 0.25}
    same_result(_chosen(attempt), _chosen(smallest_masks), inputs, mistakes=known)


@exercise("08.3", reference=masked_step)
def ex08_3(attempt: Any) -> None:
    """A weight that isn't square, with a velocity that isn't zero, neither inside nor outside the mask."""
    inputs = {
        "weight": draw(3, 5, seed=4),
        "grad": draw(3, 5, seed=5),
        "velocity": draw(3, 5, seed=6),
        "mask": draw(3, 5, seed=7) > 0.3,
        "lr": 0.1,
        "momentum": 0.9,
        "decay": 0.2,
    }
    same_result(attempt, masked_step, inputs, mistakes=STEP_MISTAKES)
