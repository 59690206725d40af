"""Notebook 22: a search's rate, what k tries reach; 22b: intruder dimensions, two ways back; 22c: a first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pefttutor.check.compare import same_result
from pefttutor.check.core import exercise
from pefttutor.check.ex22_answers import BEST_MISTAKES, TUNED_MISTAKES, expected_best, tuned
from pefttutor.check.ex22_intruders import (
    BACK_MISTAKES,
    INTRUDERS_MISTAKES,
    SHRUNK_MISTAKES,
    intruders,
    shrunk,
    stepped_back,
)
from pefttutor.check.ex22_steps import STEP_MISTAKES, first_step
from pefttutor.check.values import draw


def _rows(lr: float, scores: str, *, first_seed: int = 7, test: float = 0.5) -> list[dict[str, float]]:
    """Runs at one rate by consecutive seeds, with these validation scores."""
    return [
        {"lr": lr, "seed": first_seed + i, "validation": float(score), "test": test}
        for i, score in enumerate(scores.split())
    ]


@exercise("22.1", reference=tuned)
def ex22_1(attempt: Any) -> None:
    """Lucky and ruined runs, a rate that too few seeds tried, test seeds among the rows, equal means, both edges."""
    lucky = _rows(1e-2, "0.5 1.0 0.6") + _rows(5e-3, "0.7 0.9 0.74") + _rows(2e-3, "0.76 0.76 0.76")
    lucky += _rows(2e-2, "0.6 0.6 0.6") + _rows(2e-2, "1 1 1 1 1 1 1", first_seed=0)
    lucky += _rows(3e-2, "0.8 0.8 0.1") + _rows(5e-2, "0.95") + _rows(1e-1, "0.1 0.1 0.1")
    lucky += _rows(1e-3, "0.3 0.4 0.5", test=0.9)
    equal = _rows(2e-3, "0.5 0.75 1.0") + _rows(1e-3, "1.0 0.75 0.5") + _rows(5e-3, "0.25 0.25 0.25")
    up = _rows(1e-3, "0.1 0.2 0.3") + _rows(2e-3, "0.2 0.3 0.4") + _rows(1e-1, "0.3 0.4 0.5")
    for rows in (lucky, equal, up):
        same_result(attempt, tuned, {"rows": rows, "search_seeds": [7, 8, 9]}, mistakes=TUNED_MISTAKES)


@exercise("22.2", reference=expected_best)
def ex22_2(attempt: Any) -> None:
    """Scores in no order, two of them equal, for several k; then one try, and all of them."""
    scores = [0.3, 0.5, 0.3, 0.65, 0.7, 1.0]
    for k in (3, 2, 1, 6):
        same_result(attempt, expected_best, {"scores": scores, "k": k}, mistakes=BEST_MISTAKES)


def _invaded(seed: int) -> tuple[Tensor, Tensor]:
    """A weight (12, 8), and the same once its weakest direction has become strong and two new ones have come."""
    U, new = torch.linalg.qr(draw(12, 10, seed=seed)).Q.split([8, 2], dim=1)
    V = torch.linalg.qr(draw(8, 8, seed=seed + 1)).Q
    before = (U * torch.arange(8.0, 0.0, -1.0)) @ V.T
    sides = torch.linalg.qr(draw(8, 2, seed=seed + 2)).Q
    after = before + 11 * torch.outer(U[:, 7], V[:, 7]) + (new * torch.tensor([9.0, 6.0])) @ sides.T
    return before, after


@exercise("22.3", reference=intruders)
def ex22_3(attempt: Any) -> None:
    """Weights that aren't square, in which strong and weak directions have come, with signs either way."""
    for seed, top, epsilon in ((2397, 6, 0.7), (192, 4, 0.6), (231, 6, 0.7)):
        before, after = _invaded(seed)
        inputs = {"before": before, "after": after, "top": top, "epsilon": epsilon}
        same_result(attempt, intruders, inputs, mistakes=INTRUDERS_MISTAKES)
    calm = draw(5, 7, seed=40)
    same_result(attempt, intruders, {"before": calm, "after": 2 * calm, "top": 5, "epsilon": 0.5})


@exercise("22.4", reference=shrunk)
def ex22_4(attempt: Any) -> None:
    """Two directions that aren't the first ones, one, and none, in weights of two shapes."""
    for after, which, keep in (
        (draw(7, 5, seed=1), [1, 3], 0.75),
        (draw(4, 6, seed=2), [2], 0.25),
        (draw(4, 6, seed=2), [], 0.25),
    ):
        inputs = {"after": after, "which": which, "keep": keep}
        same_result(attempt, shrunk, inputs, mistakes=SHRUNK_MISTAKES)


@exercise("22.5", reference=stepped_back)
def ex22_5(attempt: Any) -> None:
    """A step shorter than the change, one that is longer, and a weight that nothing has changed."""
    before, after = draw(7, 5, seed=3), draw(7, 5, seed=4)
    for shorter in (after + draw(7, 5, seed=5) / 30, after + 4 * draw(7, 5, seed=5)):
        inputs = {"before": before, "after": after, "shorter": shorter}
        same_result(attempt, stepped_back, inputs, mistakes=BACK_MISTAKES)
    same_result(attempt, stepped_back, {"before": before, "after": before, "shorter": before})


@exercise("22.6", reference=first_step)
def ex22_6(attempt: Any) -> None:
    """Two factors of two ranks, one of them small."""
    for r, s, lr in ((3, 2.5, 0.25), (2, 0.5, 0.125)):
        inputs = {"G": draw(5, 7, seed=r), "A": draw(r, 7, seed=r + 10), "s": s, "lr": lr}
        same_result(attempt, first_step, inputs, mistakes=STEP_MISTAKES)
