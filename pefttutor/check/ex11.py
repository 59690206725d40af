"""Notebook 11, learned gates: a straight-through mask, a hard-concrete gate, a second-order mask and what it gains."""

from __future__ import annotations

from typing import Any

import torch

from pefttutor.check.compare import same_result
from pefttutor.check.core import exercise
from pefttutor.check.ex11_answers import (
    FALL_MISTAKES,
    GATE_MISTAKES,
    LINEAR_MISTAKES,
    SECOND_ORDER_MISTAKES,
    best_fall,
    hard_concrete,
    masked_linear,
    second_order_mask,
)
from pefttutor.check.values import draw


@exercise("11.1", reference=masked_linear)
def ex11_1(attempt: Any) -> None:
    """A batch of sequences and one vector, a layer that isn't square, a score that is the threshold itself."""
    threshold = 0.25  # exact in binary, and its negative is among the scores
    scores = 0.5 * draw(4, 3, seed=1)
    scores[0, 0], scores[1, 2], scores[2, 1] = threshold, -0.75, 0.125
    for leading in ((2, 5), ()):
        inputs = {
            "x": draw(*leading, 3, seed=2),
            "weight": draw(4, 3, seed=3),
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


@exercise("11.3", reference=second_order_mask)
def ex11_3(attempt: Any) -> None:
    """Gradients that agree on some entries and cancel on others, some of one example alone; curvatures of any size."""
    curvature = 2.0 ** draw(16, seed=8)
    gradients = draw(6, 16, seed=9) * 3.0 ** draw(6, 16, seed=11) + 0.3 * draw(16, seed=10)
    for k in (5, 7):
        inputs = {"gradients": gradients, "curvature": curvature, "k": k}
        same_result(attempt, second_order_mask, inputs, mistakes=SECOND_ORDER_MISTAKES)


@exercise("11.4", reference=best_fall)
def ex11_4(attempt: Any) -> None:
    """A Hessian whose entries interact strongly, and whose diagonal isn't 1."""
    A = draw(7, 7, seed=12)
    H = A @ A.T / 7 + 0.3 * torch.eye(7)
    for places in ((0, 2, 5), (1, 3, 4, 6)):
        chosen = torch.zeros(7, dtype=torch.bool)
        chosen[list(places)] = True
        inputs = {"g": draw(7, seed=13), "H": H, "chosen": chosen}
        same_result(attempt, best_fall, inputs, mistakes=FALL_MISTAKES)
