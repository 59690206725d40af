"""Notebook 10, Child-Tuning: F's gradient, who moves although masked, a step that doesn't leak, seeds in pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pefttutor.check.compare import same_result
from pefttutor.check.core import call, exercise, wrong
from pefttutor.check.ex10_answers import (
    ADAMW_MISTAKES,
    GRADIENTS_MISTAKES,
    IN_PLACE,
    SHARE_MISTAKES,
    masked_adamw,
    masked_gradients,
    share_outside,
)
from pefttutor.check.ex10_pairs import PAIRED_MISTAKES, paired
from pefttutor.check.values import close, draw, fresh


def _uniform(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@exercise("10.1", reference=masked_gradients)
def ex10_1(attempt: Any) -> None:
    """Tensors of different shapes, one without a gradient, and a p that isn't its own complement."""
    inputs = {
        "grads": {"a": draw(4, 6, seed=1), "frozen": None, "b": draw(7, seed=2)},
        "draws": {"a": _uniform(4, 6, seed=3), "frozen": _uniform(3, seed=4), "b": _uniform(7, seed=5)},
        "p": 0.3,
    }
    same_result(attempt, masked_gradients, inputs, mistakes=GRADIENTS_MISTAKES)
    copies = fresh(inputs)
    call(attempt, **copies)
    if not close(copies["grads"], inputs["grads"], rtol=0, atol=0):
        raise wrong(expected="the given gradients as they were", came="other values in them", likely=IN_PLACE)


@exercise("10.2", reference=share_outside)
def ex10_2(attempt: Any) -> None:
    """Every combination of the two leaks, in the first step and later. A later step first: there the answers differ."""
    for p, t in ((0.2, 4), (0.3, 8), (0.2, 1)):
        for momentum, decay in ((True, False), (False, False), (True, True), (False, True)):
            inputs = {"p": p, "t": t, "momentum": momentum, "decay": decay}
            same_result(attempt, share_outside, inputs, mistakes=SHARE_MISTAKES)


@exercise("10.3", reference=masked_adamw)
def ex10_3(attempt: Any) -> None:
    """A weight that isn't square, in its third step: moments that aren't zero, inside and outside the mask."""
    inputs = {
        "weight": draw(3, 5, seed=6),
        "grad": draw(3, 5, seed=7),
        "mask": draw(3, 5, seed=8) > 0.2,
        "exp_avg": draw(3, 5, seed=9),
        "exp_avg_sq": draw(3, 5, seed=10).square(),
        "t": 3,
        "lr": 0.1,
        "betas": (0.9, 0.99),
        "eps": 0.01,
        "decay": 0.2,
    }
    same_result(attempt, masked_adamw, inputs, mistakes=ADAMW_MISTAKES)


@exercise("10.4", reference=paired)
def ex10_4(attempt: Any) -> None:
    """Six seeds whose good and bad draws both methods share; wins and losses among the differences."""
    inputs = {"one": [71.0, 64.5, 80.2, 58.8, 69.9, 75.3], "other": [70.2, 66.9, 80.9, 57.1, 66.0, 75.9]}
    same_result(attempt, paired, inputs, mistakes=PAIRED_MISTAKES)
