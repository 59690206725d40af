"""Notebook 15: DoRA's forward pass and a start at the weight's own directions; 15b: DoRA's gradient and cheap norm."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pefttutor.check.compare import same_result
from pefttutor.check.core import call, exercise, wrong
from pefttutor.check.ex15_answers import (
    FORWARD_MISTAKES,
    GRADIENT_MISTAKES,
    direction_gradient,
    dora_forward,
)
from pefttutor.check.ex15_starts import NORM_MISTAKES, START_MISTAKES, row_norms, singular_start
from pefttutor.check.values import describe, draw, fresh


@exercise("15.1", reference=dora_forward)
def ex15_1(attempt: Any) -> None:
    """Values and gradients, for a batch of sequences and for one vector; no magnitude is at its start."""
    for leading, alpha in (((2, 3), 6.0), ((), 5.0)):
        inputs = {
            "x": draw(*leading, 5, seed=1),
            "weight": draw(7, 5, seed=2),
            "bias": draw(7, seed=3),
            "lora_A": draw(4, 5, seed=4),
            "lora_B": draw(7, 4, seed=5),
            "magnitude": draw(7, seed=6).abs() + 0.5,
            "lora_alpha": alpha,
        }
        trained = ("x", "lora_A", "lora_B", "magnitude")
        same_result(attempt, dora_forward, inputs, gradients=trained, mistakes=FORWARD_MISTAKES)
    same_result(attempt, dora_forward, inputs | {"bias": None})


@exercise("15.2", reference=singular_start)
def ex15_2(attempt: Any) -> None:
    """Signs are free; what counts is s · B A, and how S is shared between the factors."""
    inputs = {"weight": draw(9, 6, seed=7), "r": 2, "scaling": 4.0}
    for minor in (False, True):
        came = call(attempt, **fresh(inputs), minor=minor)
        if not (
            isinstance(came, tuple | list) and [getattr(p, "shape", None) for p in came] == [(2, 6), (9, 2)]
        ):
            raise wrong(
                input=f"weight (9, 6), r 2, minor {minor}",
                expected="a tuple: A (2, 6), B (9, 2)",
                came=describe(came),
                likely=_likely_shape(came),
            )
    known = {name: _shared(mistake) for name, mistake in START_MISTAKES.items()}
    same_result(_shared(attempt), _shared(singular_start), inputs, mistakes=known)


def _shared(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """What both starts amount to, whatever the signs and the order."""

    def seen(weight: Tensor, r: int, scaling: float) -> dict[str, Tensor]:
        found = {}
        for which, minor in {"strongest": False, "weakest": True}.items():
            A, B = function(weight=weight, r=r, scaling=scaling, minor=minor)
            found[f"{which}: s · B A"] = scaling * B @ A
            found[f"{which}: lengths of A's rows"] = A.norm(dim=1).sort().values
            found[f"{which}: lengths of B's columns"] = B.norm(dim=0).sort().values
        return found

    return seen


def _likely_shape(came: Any) -> str | None:
    if came is None:
        return "the function doesn't return its result"
    if isinstance(came, Tensor):
        return "this is one matrix; return the two factors"
    shapes = [tuple(getattr(part, "shape", ())) for part in came] if isinstance(came, tuple | list) else []
    if shapes == [(9, 2), (2, 6)]:
        return "A and B are returned in the wrong order: A first"
    if len(shapes) == 2 and shapes[0] == (6, 2):
        return "A is transposed: its rows are directions of the input"
    if len(shapes) == 3:
        return "this is the decomposition; return the two factors"
    return None


def _both(function: Callable[..., Tensor]) -> Callable[..., dict[str, Tensor]]:
    """The gradient with each kind of norm: then a mistake in one of them has a name of its own."""

    def seen(grad: Tensor, changed: Tensor, magnitude: Tensor) -> dict[str, Tensor]:
        kinds = {"detached": True, "not detached": False}
        return {
            kind: function(grad=grad, changed=changed, magnitude=magnitude, detach=detach)
            for kind, detach in kinds.items()
        }

    return seen


@exercise("15.3", reference=direction_gradient)
def ex15_3(attempt: Any) -> None:
    """A gradient that has a part along every row, and no magnitude at its start."""
    inputs = {
        "grad": draw(7, 5, seed=1),
        "changed": draw(7, 5, seed=2),
        "magnitude": draw(7, seed=3).abs() + 0.5,
    }
    known = {name: _both(mistake) for name, mistake in GRADIENT_MISTAKES.items()}
    same_result(_both(attempt), _both(direction_gradient), inputs, mistakes=known)


class _Largest(TorchDispatchMode):
    """Remembers the first tensor that is as large as `size` numbers and isn't a view of one that was given."""

    def __init__(self, given: Iterable[Any], size: int) -> None:
        super().__init__()
        self.given = {t.untyped_storage().data_ptr() for t in given if isinstance(t, Tensor)}
        self.size, self.found = size, "none"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, list | tuple) else [result]:
            if isinstance(made, Tensor) and made.untyped_storage().nbytes() >= self.size * made.itemsize:
                new = made.untyped_storage().data_ptr() not in self.given
                self.found = f"{tuple(made.shape)}" if new and self.found == "none" else self.found
        return result


def _watched(function: Callable[..., Any]) -> Callable[..., Any]:
    """The norms, and whether something as large as the weight was made for them."""

    def seen(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Any:
        with _Largest((weight, lora_A, lora_B), weight.numel()) as watch:
            norms = function(weight=weight, lora_A=lora_A, lora_B=lora_B, scaling=scaling)
        return norms if norms is None else {"norms": norms, "made as large as the weight": watch.found}

    return seen


@exercise("15.4", reference=row_norms)
def ex15_4(attempt: Any) -> None:
    """The norms of a weight that isn't square, and what was made on the way."""
    inputs = {
        "weight": 3 * draw(7, 9, seed=1),
        "lora_A": draw(2, 9, seed=2),
        "lora_B": draw(7, 2, seed=3),
        "scaling": 0.4,
    }
    known = {name: _watched(mistake) for name, mistake in NORM_MISTAKES.items()}
    same_result(_watched(attempt), _watched(row_norms), inputs, mistakes=known)
