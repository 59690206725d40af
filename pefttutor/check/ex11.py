"""Notebook 11, learned masks: a straight-through mask, a hard-concrete gate, a lottery ticket, a second-order mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pefttutor.check.compare import same_result
from pefttutor.check.core import exercise
from pefttutor.check.ex11_answers import (
    GATE_MISTAKES,
    LINEAR_MISTAKES,
    LOTTERY_MISTAKES,
    SECOND_ORDER_MISTAKES,
    hard_concrete,
    lottery_difference,
    masked_linear,
    second_order_mask,
)


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@exercise("11.1", reference=masked_linear)
def ex11_1(attempt: Any) -> None:
    """A batch of sequences and one vector, a layer that isn't square, a score that is the threshold itself."""
    threshold = 0.25  # exact in binary, and its negative is among the scores
    scores = 0.5 * _draw(4, 3, seed=1)
    scores[0, 0], scores[1, 2], scores[2, 1] = threshold, -0.75, 0.125
    for leading in ((2, 5), ()):
        inputs = {
            "x": _draw(*leading, 3, seed=2),
            "weight": _draw(4, 3, seed=3),
            "scores": scores,
            "threshold": threshold,
        }
        same_result(attempt, masked_linear, inputs, gradients=("x", "scores"), mistakes=LINEAR_MISTAKES)


@exercise("11.2", reference=hard_concrete)
def ex11_2(attempt: Any) -> None:
    """An uneven stretch, so that log(−l / r) isn't 0, and draws that close, open and half open the gate."""
    u = torch.tensor([[0.02, 0.3, 0.6], [0.9, 0.97, 0.45]])
    alpha = torch.tensor([[-1.0, 0.4, 1.2], [0.1, 2.0, -0.3]])
    inputs = {"alpha": alpha, "u": u, "left": -0.4, "right": 1.3}
    same_result(attempt, hard_concrete, inputs, gradients=("alpha",), mistakes=GATE_MISTAKES)


@exercise("11.3", reference=lottery_difference)
def ex11_3(attempt: Any) -> None:
    """Tensors of different shapes and scales, so that shares by tensor, by size and by change all differ."""
    start = {"a": _draw(5, 3, seed=4), "b": 4 * _draw(7, seed=5), "c": 0.2 * _draw(2, 4, 2, seed=6)}
    first = {name: w + 0.3 * _draw(*w.shape, seed=7 + i) for i, (name, w) in enumerate(start.items())}
    second = {name: w + 0.3 * _draw(*w.shape, seed=17 + i) for i, (name, w) in enumerate(start.items())}
    for k in (5, 11):
        inputs = {"start": start, "first": first, "second": second, "k": k}
        same_result(attempt, lottery_difference, inputs, mistakes=LOTTERY_MISTAKES)


@exercise("11.4", reference=second_order_mask)
def ex11_4(attempt: Any) -> None:
    """Gradients that agree on some entries and cancel on others, some of one example alone; curvatures of any size."""
    curvature = 2.0 ** _draw(16, seed=8)
    gradients = _draw(6, 16, seed=9) * 3.0 ** _draw(6, 16, seed=11) + 0.3 * _draw(16, seed=10)
    for k in (5, 7):
        inputs = {"gradients": gradients, "curvature": curvature, "k": k}
        same_result(attempt, second_order_mask, inputs, mistakes=SECOND_ORDER_MISTAKES)
