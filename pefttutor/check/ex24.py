"""Notebook 24, lottery tickets: the difference that a ticket leaves, a choice by hard examples, differences added."""

from __future__ import annotations

from typing import Any

import torch

from pefttutor.check.compare import same_result
from pefttutor.check.core import exercise
from pefttutor.check.ex24_answers import (
    COMPOSED_MISTAKES,
    HARD_MISTAKES,
    LOTTERY_MISTAKES,
    composed,
    hard_fisher,
    lottery_difference,
)
from pefttutor.check.values import draw


@exercise("24.1", reference=lottery_difference)
def ex24_1(attempt: Any) -> None:
    """Tensors of different shapes and scales, so that shares by tensor, by size and by change all differ."""
    start = {"a": draw(5, 3, seed=4), "b": 4 * draw(7, seed=5), "c": 0.2 * draw(2, 4, 2, seed=6)}
    first = {name: w + 0.3 * draw(*w.shape, seed=7 + i) for i, (name, w) in enumerate(start.items())}
    second = {name: w + 0.3 * draw(*w.shape, seed=17 + i) for i, (name, w) in enumerate(start.items())}
    for k in (5, 11):
        inputs = {"start": start, "first": first, "second": second, "k": k}
        same_result(attempt, lottery_difference, inputs, mistakes=LOTTERY_MISTAKES)


@exercise("24.2", reference=hard_fisher)
def ex24_2(attempt: Any) -> None:
    """Counts that the share decides (cut, not rounded), that the upper limit decides, and that the lower one does."""
    for n, share, most in ((13, 0.5, 8), (13, 0.5, 4), (9, 0.2, 25)):
        inputs = {
            "losses": draw(n, seed=21).abs(),
            "gradients": [{"a": draw(2, 3, seed=30 + s), "b": draw(4, seed=60 + s)} for s in range(n)],
            "share": share,
            "most": most,
        }
        same_result(attempt, hard_fisher, inputs, mistakes=HARD_MISTAKES)


@exercise("24.3", reference=composed)
def ex24_3(attempt: Any) -> None:
    """A place that both change, a tensor that one of them changes, and one that none does."""
    start = {"a": draw(3, 4, seed=41), "b": draw(5, seed=42), "c": draw(2, 2, seed=43)}
    one = {"a": (torch.tensor([0, 5, 7]), draw(3, seed=44)), "b": (torch.tensor([2]), draw(1, seed=45))}
    two = {"a": (torch.tensor([7, 11]), draw(2, seed=46))}
    for differences in ([one, two], [two, one, two]):
        inputs = {"start": start, "differences": differences}
        same_result(attempt, composed, inputs, mistakes=COMPOSED_MISTAKES)
