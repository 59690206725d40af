"""Notebook 14, ranks that move: AdaLoRA's penalty, importance and budget, and SoRA's proximal step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pefttutor.check.compare import same_result
from pefttutor.check.core import exercise
from pefttutor.check.ex14_answers import (
    BUDGET_MISTAKES,
    IMPORTANCE_MISTAKES,
    ORTHOGONALITY_MISTAKES,
    PROXIMAL_MISTAKES,
    budget,
    importance,
    orthogonality,
    proximal,
)
from pefttutor.check.values import draw


@exercise("14.1", reference=orthogonality)
def ex14_1(attempt: Any) -> None:
    """Values and gradients, of few long rows and of as many as they are long; lengths aren't 1."""
    for shape in ((3, 5), (4, 4)):
        inputs = {"rows": draw(*shape, seed=1) / 2}
        same_result(attempt, orthogonality, inputs, gradients=("rows",), mistakes=ORTHOGONALITY_MISTAKES)


@exercise("14.2", reference=importance)
def ex14_2(attempt: Any) -> None:
    """Averages that are there already, two shares that differ, gradients of both signs."""
    inputs = {
        "weight": draw(3, 4, seed=3),
        "grad": draw(3, 4, seed=4),
        "mean": draw(3, 4, seed=5).abs(),
        "spread": draw(3, 4, seed=6).abs(),
        "beta1": 0.8,
        "beta2": 0.6,
    }
    same_result(attempt, importance, inputs, mistakes=IMPORTANCE_MISTAKES)


@exercise("14.3", reference=budget)
def ex14_3(attempt: Any) -> None:
    """Two schedules at every step, and at some after the end."""
    for first, last, tinit, tfinal, total in ((96, 64, 4, 7, 24), (33, 10, 1, 3, 12)):
        inputs = {"first": first, "last": last, "tinit": tinit, "tfinal": tfinal, "total": total}
        same_result(
            _at_every_step(attempt),
            _at_every_step(budget),
            inputs,
            mistakes={name: _at_every_step(mistake) for name, mistake in BUDGET_MISTAKES.items()},
        )


def _at_every_step(function: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    def course(*, total: int, **settings: int) -> dict[str, Any]:
        return {f"step {step}": function(step=step, total=total, **settings) for step in range(total + 3)}

    return course


@exercise("14.4", reference=proximal)
def ex14_4(attempt: Any) -> None:
    """Gates below λ, between λ and 2 λ, and above, of both signs, and zero."""
    gate = torch.tensor([[-1.3, -0.9, -0.2], [0.0, 0.3, 0.7], [1.1, 2.0, -2.4]])
    same_result(attempt, proximal, {"gate": gate, "by": 0.6}, mistakes=PROXIMAL_MISTAKES)
