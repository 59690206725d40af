"""Notebook 06, fusion of adapters: each one's share, the place in the block, the start, the pull on V."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pefttutor.check.compare import same_result
from pefttutor.check.core import exercise
from pefttutor.check.ex06_answers import (
    PENALTY_MISTAKES,
    SHARES_MISTAKES,
    START_MISTAKES,
    SUBLAYER_MISTAKES,
    fused_sublayer,
    fusion_start,
    penalty,
    shares,
)
from pefttutor.check.values import draw


@exercise("06.1", reference=shares)
def ex06_1(attempt: Any) -> None:
    """Scores of about one, so that no softmax is saturated; more tokens than adapters, and more features."""
    inputs = {
        "h": draw(2, 4, 5, seed=1),
        "z": draw(2, 4, 3, 5, seed=2),
        "query": draw(5, 5, seed=3) / 3,
        "query_bias": draw(5, seed=4) / 2,
        "key": draw(5, 5, seed=5) / 3,
    }
    same_result(attempt, shares, inputs, gradients=("h", "z", "query", "key"), mistakes=SHARES_MISTAKES)


@exercise("06.2", reference=fused_sublayer)
def ex06_2(attempt: Any) -> None:
    """Three adapters that aren't linear; the calls are counted, and the gradient goes through all of them."""
    known = {name: functools.partial(_placed, mistake) for name, mistake in SUBLAYER_MISTAKES.items()}
    same_result(
        functools.partial(_placed, attempt),
        functools.partial(_placed, fused_sublayer),
        {"h": draw(2, 4, 5, seed=6), "value": draw(5, 5, seed=7)},
        gradients=("h", "value"),
        mistakes=known,
    )


@exercise("06.3", reference=fusion_start)
def ex06_3(attempt: Any) -> None:
    """What is the same for every right draw: two right answers needn't draw the same numbers."""
    known = {name: functools.partial(_portrait, mistake) for name, mistake in START_MISTAKES.items()}
    same_result(
        functools.partial(_portrait, attempt),
        functools.partial(_portrait, fusion_start),
        {"width": 64},
        mistakes=known,
    )


@exercise("06.4", reference=penalty)
def ex06_4(attempt: Any) -> None:
    """Layers of two widths, so that a sum and a mean differ in more than a factor."""
    inputs = {"values": [draw(3, 3, seed=8), draw(3, 3, seed=9), draw(4, 4, seed=10)], "weight": 0.1}
    same_result(_with_gradients(attempt), _with_gradients(penalty), inputs, mistakes={
        name: _with_gradients(mistake) for name, mistake in PENALTY_MISTAKES.items()
    })  # fmt: skip


def _placed(function: Callable[..., Any], h: Tensor, value: Tensor) -> dict[str, Any]:
    called = [0, 0, 0]

    def adapter(n: int, x: Tensor) -> Tensor:
        called[n] += 1
        return torch.sin(x @ draw(5, 5, seed=20 + n))

    def choose(h: Tensor, z: Tensor) -> Tensor:
        return (h.unsqueeze(-2) * torch.cos(z)).sum(-1).softmax(-1)

    adapters = [functools.partial(adapter, n) for n in range(3)]
    return {
        "y": function(h=h, adapters=adapters, choose=choose, value=value),
        "calls of adapter 0, 1, 2": called,
    }


def _portrait(made: Callable[..., Any], width: int) -> dict[str, Any]:
    drawn, again = (made(width=width, generator=torch.Generator().manual_seed(11)) for _ in range(2))
    query, bias, key, value = drawn
    seen: dict[str, Any] = {"shapes of Q, b, K, V": [tuple(t.shape) for t in drawn]}
    if seen["shapes of Q, b, K, V"] != [(width, width), (width,), (width, width), (width, width)]:
        return seen
    return seen | {
        "V": "the identity" if torch.equal(value, torch.eye(width)) else _size(value),
        "Q": _size(query),
        "K": _size(key),
        "Q and K are the same": bool(torch.equal(query, key)),
        "values of b that aren't 0": int((bias != 0).sum()),
        "the same generator gives the same numbers": all(map(torch.equal, drawn, again)),
    }


def _size(matrix: Tensor) -> str:
    """Roughly how its entries are distributed."""
    if (matrix == matrix[0, 0]).all():
        return "zeros" if not matrix.any() else "one number everywhere"
    off = matrix[~torch.eye(len(matrix), dtype=torch.bool)]
    spread, diagonal = float(off.std()), float(matrix.diagonal().mean())
    if abs(diagonal) > 0.5 and spread < 0.1:
        return "the identity" if not off.any() else "nearly the identity"
    return f"standard deviation about {spread:.1g}"


def _with_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of several matrices and a number, which gives each matrix's gradient as well."""

    def both(values: list[Tensor], weight: float) -> dict[str, Any]:
        leaves = [value.detach().requires_grad_() for value in values]
        found = function(values=leaves, weight=weight)
        connected = isinstance(found, Tensor) and found.requires_grad
        grads = torch.autograd.grad(found, leaves, allow_unused=True) if connected else [None] * len(leaves)
        return {
            "penalty": found,
            "gradients": [0 * v if g is None else g for v, g in zip(values, grads, strict=True)],
        }

    return both
