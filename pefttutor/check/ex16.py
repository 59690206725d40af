"""Notebook 16: two ways of adding up LoRAs, what a search makes small, and a search without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pefttutor.check.compare import same_result
from pefttutor.check.core import call, exercise, wrong
from pefttutor.check.ex16_answers import BESIDE_MISTAKES, FACTOR_MISTAKES, beside, sum_factors
from pefttutor.check.ex16_search import OBJECTIVE_MISTAKES, SEARCH_MISTAKES, objective, search
from pefttutor.check.values import describe, draw, fresh

N, R, IN, OUT = 3, 2, 5, 7


def _plugins() -> dict[str, Any]:
    """Three plug-ins of a matrix that isn't square, one of them with a negative weight."""
    A, B = draw(N, R, IN, seed=1), draw(N, OUT, R, seed=2)
    return {"A": A, "B": B, "w": torch.tensor([0.7, -1.2, 0.4]), "s": 1.5}


@exercise("16.1", reference=sum_factors)
def ex16_1(attempt: Any) -> None:
    """Values and gradients."""
    same_result(attempt, sum_factors, _plugins(), gradients=("A", "B", "w"), mistakes=FACTOR_MISTAKES)


def _product(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """What the pair amounts to, whichever of the two has the weights."""

    def seen(**inputs: Any) -> Tensor:
        A, B = function(**inputs)
        return B @ A

    return seen


@exercise("16.2", reference=beside)
def ex16_2(attempt: Any) -> None:
    """The shapes, then the product and its gradients."""
    inputs = _plugins()
    came = call(attempt, **fresh(inputs))
    wide = [(N * R, IN), (OUT, N * R)]
    shapes = [getattr(part, "shape", None) for part in came] if isinstance(came, tuple | list) else None
    if shapes != wide:
        raise wrong(
            input=f"A {(N, R, IN)}, B {(N, OUT, R)}, w {(N,)}, s",
            expected=f"a tuple: A {wide[0]}, B {wide[1]}",
            came=describe(came),
            likely=_likely(came, shapes or []),
        )
    known = {name: _product(mistake) for name, mistake in BESIDE_MISTAKES.items()}
    same_result(_product(attempt), _product(beside), inputs, gradients=("A", "B", "w"), mistakes=known)


def _likely(came: Any, shapes: list[Any]) -> str | None:
    if came is None:
        return "the function doesn't return its result"
    if isinstance(came, Tensor):
        return "this is one matrix; return the two factors"
    if shapes == [(OUT, N * R), (N * R, IN)]:
        return "A and B are returned in the wrong order: A first"
    if shapes == [(R, IN), (OUT, R)]:
        return "the factors are summed, as in exercise 16.1: put them beside each other"
    if shapes[1:] == [(N * OUT, R)]:
        return "the N matrices B stand below each other: their columns belong beside each other, dim=1"
    if shapes[:1] == [(R, N * IN)]:
        return "the N matrices A stand beside each other: their rows belong below each other, dim=0"
    return None


@exercise("16.3", reference=objective)
def ex16_3(attempt: Any) -> None:
    """Three batches, the last of which is smaller, and weights of both signs."""
    inputs = {
        "batch_means": torch.tensor([2.0, 1.1, 3.7]),
        "sizes": torch.tensor([3, 3, 1]),
        "w": torch.tensor([0.7, -1.2, 0.4, 0.0, -0.3]),
        "l1": 0.5,
    }
    same_result(attempt, objective, inputs, gradients=("batch_means", "w"), mistakes=OBJECTIVE_MISTAKES)


def _watched(function: Callable[..., Tensor]) -> Callable[..., dict[str, Any] | None]:
    """What was asked for, in order, and what was returned; the least cost lies partly beyond the bound."""

    def seen(n: int, tries: int, bound: float, step: float, seed: int) -> dict[str, Any] | None:
        asked: list[Tensor] = []

        def cost(w: Tensor) -> float:
            asked.append(w.detach().clone())
            return float((w - torch.tensor([2.0, -0.6, 0.3, 0.0])).abs().sum())

        generator = torch.Generator().manual_seed(seed)
        came = function(cost=cost, n=n, tries=tries, bound=bound, step=step, generator=generator)
        if came is None:
            return None
        shown = {f"try {i + 1}": w for i, w in enumerate(asked)}
        return {"number of tries": len(asked), **shown, "returned": came}

    return seen


@exercise("16.4", reference=search)
def ex16_4(attempt: Any) -> None:
    """Every candidate, in order: they follow from the generator. Some would leave the bound."""
    known = {name: _watched(mistake) for name, mistake in SEARCH_MISTAKES.items()}
    for seed in (0, 1):
        inputs = {"n": 4, "tries": 9, "bound": 1.0, "step": 0.7, "seed": seed}
        same_result(_watched(attempt), _watched(search), inputs, mistakes=known)
