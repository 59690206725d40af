"""Notebook 09, Fisher information: a closed formula, the squares of a linear layer, and the mask within its budget."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pefttutor.check.compare import same_result
from pefttutor.check.core import call, exercise, wrong
from pefttutor.check.ex09_answers import (
    MASKS_MISTAKES,
    SQUARED_MISTAKES,
    TIES,
    TRUE_FISHER_MISTAKES,
    fish_masks,
    squared_gradients,
    true_fisher,
)
from pefttutor.check.values import draw


@exercise("09.1", reference=true_fisher)
def ex09_1(attempt: Any) -> None:
    """More inputs than classes, unequal probabilities, and none of them near 0 or 1."""
    inputs = {"x": draw(7, 5, seed=1) + 0.5, "weight": 0.4 * draw(3, 5, seed=2)}
    same_result(attempt, true_fisher, inputs, mistakes=TRUE_FISHER_MISTAKES)


@exercise("09.2", reference=squared_gradients)
def ex09_2(attempt: Any) -> None:
    """A layer that isn't square, several samples, several tokens."""
    inputs = {"a": draw(4, 3, 6, seed=3), "delta": draw(4, 3, 5, seed=4)}
    same_result(attempt, squared_gradients, inputs, mistakes=SQUARED_MISTAKES)


def _information() -> dict[str, Tensor]:
    """Squares of different scales; names that contain the head's name without being in it. N = 86, |head| = 6."""
    shapes = {"embed.weight": (6, 5), "body.score.bias": (7,), "score_norm.weight": (3,)}
    shapes |= {"layers.0.weight": (8, 5), "score.weight": (2, 3)}
    scales = (1.0, 3.0, 2.0, 0.5, 2.0)
    return {
        name: scale * draw(*shape, seed=seed).square()
        for seed, ((name, shape), scale) in enumerate(zip(shapes.items(), scales, strict=True), start=5)
    }


@exercise("09.3", reference=fish_masks)
def ex09_3(attempt: Any) -> None:
    """Budgets that don't divide N; then many entries without any information, of which some must be taken."""
    fisher = _information()
    for fraction in (0.35, 0.45):
        inputs = {"fisher": fisher, "fraction": fraction, "head": "score"}
        same_result(attempt, fish_masks, inputs, mistakes=MASKS_MISTAKES)
    zeros = fisher | {"embed.weight": torch.zeros(6, 5)}
    came = sum(int(mask.sum()) for mask in call(attempt, zeros, 0.75, "score").values())
    if came != 64:
        raise wrong(
            input="the same with 30 zeros in embed.weight, fraction 0.75 of 86",
            expected="64 entries that train: 6 of the head and the 58 largest others",
            came=f"{came}",
            likely=TIES if came == 86 else None,
        )
