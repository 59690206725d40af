"""Notebook 05, adapters: the bottleneck and its start, its place in a sublayer, the count; in 05b AdapterDrop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pefttutor.check.compare import Mistakes, same_result
from pefttutor.check.core import exercise
from pefttutor.check.ex05_answers import (
    BOTTLENECK_MISTAKES,
    SUBLAYER_MISTAKES,
    Bottleneck,
    adapted_sublayer,
)
from pefttutor.check.ex05_blocks import COUNT_MISTAKES, DROP_MISTAKES, adapter_count, for_all_tasks
from pefttutor.check.values import draw

NAMES = ("down", "down_bias", "up", "up_bias")


@exercise("05.1", reference=Bottleneck)
def ex05_1(attempt: Any) -> None:
    """The start, of which no two right answers draw the same numbers; then the formula, with numbers that we give."""
    inputs = {"h": draw(2, 3, 48, seed=1), "width": 48, "m": 12, "scaling": 4.0}
    _observed(_portrait, attempt, Bottleneck, inputs, BOTTLENECK_MISTAKES, gradients=("h",))


@exercise("05.2", reference=adapted_sublayer)
def ex05_2(attempt: Any) -> None:
    """A sublayer and an adapter that aren't linear; the calls are counted, and the gradient goes through both."""
    _observed(
        _placed, attempt, adapted_sublayer, {"x": draw(2, 3, 5, seed=6)}, SUBLAYER_MISTAKES, gradients=("x",)
    )


@exercise("05.3", reference=adapter_count)
def ex05_3(attempt: Any) -> None:
    """All three placements, with norms that train and without."""
    for placement, norm_values in (("houlsby", 70), ("pfeiffer", 0), ("parallel", 90)):
        inputs = {"width": 20, "m": 3, "blocks": 6, "placement": placement, "norm_values": norm_values}
        same_result(attempt, adapter_count, inputs, mistakes=COUNT_MISTAKES)


@exercise("05.4", reference=for_all_tasks)
def ex05_4(attempt: Any) -> None:
    """Blocks that are all different, adapters that are all different, and every call counted."""
    for skip in (2, 0, 4):
        inputs = {"x": draw(2, 3, seed=7), "skip": skip}
        _observed(_run_tasks, attempt, for_all_tasks, inputs, DROP_MISTAKES)


def _observed(
    look: Callable[..., Any],
    attempt: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: dict[str, Any],
    mistakes: Mistakes,
    **options: Any,
) -> None:
    """`same_result` of what `look` sees of a function: look(function, **inputs)."""
    known = {name: functools.partial(look, mistake) for name, mistake in mistakes.items()}
    seen, right = functools.partial(look, attempt), functools.partial(look, reference)
    same_result(seen, right, inputs, mistakes=known, **options)


def _portrait(made: Callable[..., Any], h: Tensor, width: int, m: int, scaling: float) -> dict[str, Any]:
    """What is the same for every right draw of W_d, b_d, W_u and b_u; then A(h) and gradients, at numbers of ours."""
    adapter, again = (
        made(width=width, m=m, scaling=scaling, generator=torch.Generator().manual_seed(8)) for _ in range(2)
    )
    drawn = [getattr(adapter, name) for name in NAMES]
    seen: dict[str, Any] = {
        "parameters": sorted(name for name, _ in adapter.named_parameters()),
        "shapes": [tuple(t.shape) for t in drawn],
    }
    if seen["parameters"] != sorted(NAMES) or seen["shapes"] != [(m, width), (m,), (width, m), (width,)]:
        return seen
    seen |= _start(*(t.detach() for t in drawn))
    seen["the same generator gives the same numbers"] = torch.equal(drawn[0], again.down)
    with torch.no_grad():
        for seed, parameter in enumerate(drawn, start=2):
            parameter.copy_(draw(*parameter.shape, seed=seed) / 4)
    y = adapter(h)
    found = torch.autograd.grad(
        (y * draw(*y.shape, seed=11)).sum(), drawn, retain_graph=True, allow_unused=True
    )
    return seen | {"A(h)": y, "gradients": dict(zip(NAMES, found, strict=True))}


def _start(down: Tensor, _down_bias: Tensor, up: Tensor, up_bias: Tensor) -> dict[str, Any]:
    m, width = down.shape
    largest = float(down.abs().max())
    ranges = {"±1/√d": width**-0.5, "±1/√m": m**-0.5, "±1": 1.0}
    small = "all, and they are small" if up.abs().max() < 0.02 else "all"
    return {
        "values of W_u that aren't 0": small if up.any() else "none",
        "numbers in W_u": "one" if (up == up[0, 0]).all() else "different ones",
        "values of b_u that aren't 0": int((up_bias != 0).sum()),
        "range of W_d": next(
            (name for name, r in ranges.items() if 0.9 < largest / r < 1.001), "another one"
        ),
        "W_d has positive and negative numbers": bool(down.max() > 0 > down.min()),
        "independent rows of W_d": int(torch.linalg.matrix_rank(down)),
    }


def _placed(function: Callable[..., Any], x: Tensor) -> dict[str, Any]:
    weight, other = draw(5, 5, seed=9), draw(5, 5, seed=10)
    called = {"f": 0, "adapter": 0}

    def f(value: Tensor) -> Tensor:
        called["f"] += 1
        return torch.tanh(value @ weight)

    def adapter(value: Tensor) -> Tensor:
        called["adapter"] += 1
        return torch.sin(value @ other)

    results = {p: function(f=f, x=x, adapter=adapter, placement=p) for p in ("serial", "parallel")}
    return {"y": results, "calls of f": called["f"], "calls of the adapter": called["adapter"]}


def _run_tasks(function: Callable[..., Any], x: Tensor, skip: int) -> dict[str, Any]:
    called = [0] * 4

    def block(i: int, h: Tensor, adapter: float | None) -> Tensor:
        called[i] += 1
        h = torch.tanh(h @ draw(3, 3, seed=20 + i))
        return h if adapter is None else h + torch.sin(adapter * h)

    blocks = [functools.partial(block, i) for i in range(4)]
    tasks = {
        name: [1 + 0.3 * j + 0.07 * i for i in range(4)] for j, name in enumerate(("red", "green", "blue"))
    }
    results = function(x=x, blocks=blocks, tasks=tasks, skip=skip)
    return {"results": results, "calls of block 0, 1, 2, 3": called}
