"""Notebook 04, prefix tuning: attention with a prefix, the prefix's share, its place in a cache, the MLP."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.check.compare import same_result
from pefttutor.check.core import exercise
from pefttutor.check.ex04_answers import ATTENTION_MISTAKES, SHARE_MISTAKES, prefix_attention, prefix_share
from pefttutor.check.ex04_prefix import MLP_MISTAKES, PAIRS_MISTAKES, MadeByMLP, layer_pairs
from pefttutor.check.values import draw

LEAVES = ("table", "first.weight", "first.bias", "second.weight", "second.bias")


@exercise("04.1", reference=prefix_attention)
def ex04_1(attempt: Any) -> None:
    """A prefix longer than the text, then one that is shorter, and padding on both sides; the gradient of all."""
    for count, mask in (
        (4, [[1, 1, 1], [1, 1, 1]]),
        (3, [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]),
    ):
        seen = torch.tensor(mask)
        text = {
            name: draw(len(mask), 2, seen.shape[1], 4, seed=seed) for seed, name in enumerate("qkv", start=1)
        }
        own = {"prefix_k": draw(2, count, 4, seed=4), "prefix_v": draw(2, count, 4, seed=5)}
        same_result(
            attempt,
            prefix_attention,
            {**text, **own, "mask": seen},
            gradients=("q", "k", "v", "prefix_k", "prefix_v"),
            mistakes=ATTENTION_MISTAKES,
        )


@exercise("04.2", reference=prefix_share)
def ex04_2(attempt: Any) -> None:
    """Keys that aren't seen, with gradients; then scores so large that exp overflows."""
    prefix_scores, text_scores = draw(2, 3, 4, seed=6), draw(2, 3, 5, seed=7)
    text_scores[0, 0, 3:] = text_scores[1, 2, :2] = -torch.inf
    for level in (0.0, 100.0):  # both parts alike, so that no share is 0 or 1
        inputs = {"prefix_scores": prefix_scores + level, "text_scores": text_scores + level}
        same_result(attempt, prefix_share, inputs, gradients=tuple(inputs), mistakes=SHARE_MISTAKES)


@exercise("04.3", reference=layer_pairs)
def ex04_3(attempt: Any) -> None:
    """Layers, heads, virtual tokens, head size and texts that are all of another number."""
    for layers, heads, batch, count in ((3, 2, 4, 5), (2, 3, 1, 4)):
        inputs = {"prefix": draw(count, 2 * layers * heads * 6, seed=8)}
        inputs |= {"layers": layers, "heads": heads, "batch": batch}  # type: ignore[dict-item]
        same_result(
            _listed(attempt),
            _listed(layer_pairs),
            inputs,
            gradients=("prefix",),
            mistakes={name: _listed(mistake) for name, mistake in PAIRS_MISTAKES.items()},
        )


@exercise("04.4", reference=MadeByMLP)
def ex04_4(attempt: Any) -> None:
    """The parameters and their start; then the formula with numbers that we give, and what is kept of it."""
    same_result(
        functools.partial(_portrait, attempt),
        functools.partial(_portrait, MadeByMLP),
        {"count": 3, "d": 5, "m": 4, "width": 6},
        mistakes={name: functools.partial(_portrait, mistake) for name, mistake in MLP_MISTAKES.items()},
    )


def _listed(function: Callable[..., Any]) -> Callable[..., Any]:
    """What `function` gives, as a list of tuples whatever kind of sequence it is."""

    def seen(**inputs: Any) -> Any:
        came = function(**inputs)
        if isinstance(came, list | tuple):
            return [tuple(pair) if isinstance(pair, list | tuple) else pair for pair in came]
        return came

    return seen


def _portrait(made: Callable[..., Any], count: int, d: int, m: int, width: int) -> dict[str, Any]:
    """What is the same for every right draw of the values; then result, gradients and what is kept, at ours."""
    model = made(count=count, d=d, m=m, width=width)
    named = dict(model.named_parameters())
    seen: dict[str, Any] = {"parameters": {name: tuple(named[name].shape) for name in sorted(named)}}
    if sorted(named) != sorted(LEAVES):
        return seen
    seen["independent rows of the table"] = int(torch.linalg.matrix_rank(model.table.detach()))
    with torch.no_grad():
        for seed, name in enumerate(LEAVES, start=10):
            named[name].copy_(draw(*named[name].shape, seed=seed))
    prefix = model()
    total = (prefix * draw(*prefix.shape, seed=20)).sum()
    found = torch.autograd.grad(total, [named[name] for name in LEAVES], allow_unused=True)
    kept = model.dropped()
    return seen | {
        "prefix": prefix.detach(),
        "gradients": dict(zip(LEAVES, found, strict=True)),
        "kept": kept.detach() if isinstance(kept, Tensor) else kept,
        "what is kept is an nn.Parameter": isinstance(kept, nn.Parameter),
        "what is kept hangs on a graph": isinstance(kept, Tensor) and kept.grad_fn is not None,
    }
