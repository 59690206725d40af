"""Notebook 02: the right answers, and those that learners write instead, each with its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

# ---- the reference solutions


def static_bytes(model: nn.Module, moment_bytes: int) -> tuple[int, int, int]:
    """(weights, gradients, AdamW's two moments) in bytes; a shared parameter counts once."""
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    weights, gradients = (sum(p.numel() * p.element_size() for p in group) for group in (parameters, trained))
    return weights, gradients, 2 * moment_bytes * sum(p.numel() for p in trained)


def feed_forward_bytes(
    tokens: int, d: int, m: int, itemsize: int, weights_train: bool, input_grad: bool
) -> int:
    """The bytes that autograd keeps of down(silu(gate(x)) · up(x)).

    It keeps x (tokens, d) and the product (tokens, m) where weights train, and gate, up and silu (tokens, m) where
    anything at or below them needs a gradient.
    """
    numbers = tokens * (d + m) if weights_train else 0
    if weights_train or input_grad:
        numbers += 3 * tokens * m
    return numbers * itemsize


def kv_cache_bytes(
    layers: int, heads: int, kv_heads: int, head_dim: int, batch: int, length: int, itemsize: int
) -> int:
    """Keys and values, of every layer, key-value head, sequence and token."""
    return 2 * layers * kv_heads * head_dim * batch * length * itemsize


# ---- what learners write instead


def _static(
    *,
    of: Callable[[nn.Module], list[Any]] = lambda model: list(model.parameters()),
    width: Callable[[Any], int] = lambda p: p.element_size(),
    moments: Callable[[int, Any], int] = lambda size, p: 2 * size,
    trained: Callable[[Any], bool] = lambda p: p.requires_grad,
) -> Callable[..., tuple[int, int, int]]:
    def wrong_static(model: nn.Module, moment_bytes: int) -> tuple[int, int, int]:
        parameters = of(model)
        learnt = [p for p in parameters if trained(p)]
        return (
            sum(p.numel() * width(p) for p in parameters),
            sum(p.numel() * width(p) for p in learnt),
            sum(p.numel() * moments(moment_bytes, p) for p in learnt),
        )

    return wrong_static


STATIC_MISTAKES: dict[str, Callable[..., Any]] = {
    "these are numbers, not bytes: a bfloat16 number has p.element_size() = 2 of them, a float32 number 4": _static(
        width=lambda p: 1
    ),
    "every number is taken for 4 bytes; ask p.element_size()": _static(width=lambda p: 4),
    "every number is taken for 2 bytes; ask p.element_size()": _static(width=lambda p: 2),
    "frozen parameters get gradients and moments, too; they get none": _static(trained=lambda p: True),
    "gradients and moments are those of what is frozen": _static(trained=lambda p: not p.requires_grad),
    "AdamW keeps two moments for each number, not one": _static(moments=lambda size, p: size),
    "AdamW keeps two moments for each number, not three": _static(moments=lambda size, p: 3 * size),
    "the moments have the width of their parameter; here they have moment_bytes": _static(
        moments=lambda size, p: 2 * p.element_size()
    ),
    "a tied weight is counted under each of its names": _static(
        of=lambda model: [p for _, p in model.named_parameters(remove_duplicate=False)]
    ),
    "buffers are counted; they are no parameters": _static(
        of=lambda model: [*model.parameters(), *model.buffers()]
    ),
    "biases and other vectors are left out": _static(
        of=lambda model: [p for p in model.parameters() if p.ndim > 1]
    ),
    "the frozen weights are left out of the first number: they are in memory, too": _static(
        of=lambda model: [p for p in model.parameters() if p.requires_grad]
    ),
    "state_dict() has a tied weight twice, and buffers; ask parameters()": lambda model, moment_bytes: (
        sum(t.numel() * t.element_size() for t in model.state_dict().values()),
        *static_bytes(model, moment_bytes)[1:],
    ),
    "what state_dict() gives never needs a gradient; ask parameters()": _static(
        of=lambda model: list(model.state_dict().values())
    ),
    "p.grad is None before a step: count the parameters that train": lambda model, moment_bytes: (
        static_bytes(model, moment_bytes)[0],
        0,
        static_bytes(model, moment_bytes)[2],
    ),
    "gradients and moments stand in the wrong order": lambda model, moment_bytes: tuple(
        static_bytes(model, moment_bytes)[i] for i in (0, 2, 1)
    ),
    "this is their sum; return the three numbers": lambda model, moment_bytes: sum(
        static_bytes(model, moment_bytes)
    ),
}


def _kept(numbers: Callable[..., int]) -> Callable[..., int]:
    return lambda tokens, d, m, itemsize, weights_train, input_grad: (
        itemsize * numbers(tokens, d, m, weights_train, input_grad)
    )


FEED_FORWARD_MISTAKES: dict[str, Callable[..., Any]] = {
    "all of it is counted whatever trains": _kept(lambda t, d, m, w, g: t * (d + 4 * m)),
    "a frozen layer keeps something, too: silu and the product need their inputs while x needs a gradient": _kept(
        lambda t, d, m, w, g: t * (d + 4 * m) if w else 0
    ),
    "without any gradient nothing is kept": _kept(lambda t, d, m, w, g: t * (d + 4 * m) if w else 3 * t * m),
    "whether the input needs a gradient decides everything here; weights that train need it kept, too": _kept(
        lambda t, d, m, w, g: (t * (d + 4 * m) if w else 3 * t * m) if g else 0
    ),
    "gate's output needs a gradient as soon as its weight trains: gate, silu and up don't wait for x": _kept(
        lambda t, d, m, w, g: t * ((d + m) * w + 3 * m * g)
    ),
    "x is missing: gate and up keep it where they train": _kept(
        lambda t, d, m, w, g: 4 * t * m if w else 3 * t * m * g
    ),
    "x is counted twice; gate and up keep the same storage": _kept(
        lambda t, d, m, w, g: t * (2 * d + 4 * m) if w else 3 * t * m * g
    ),
    "the product, input of down, is missing: it is kept where down trains": _kept(
        lambda t, d, m, w, g: t * (d + 3 * m) if w else 3 * t * m * g
    ),
    "the product is kept only where down trains": _kept(
        lambda t, d, m, w, g: t * (d + 4 * m) if w else 4 * t * m * g
    ),
    "silu(gate) is missing: the product keeps both of its factors, and silu its input": _kept(
        lambda t, d, m, w, g: t * (d + 3 * m) if w else 2 * t * m * g
    ),
    "a frozen layer doesn't keep x": _kept(
        lambda t, d, m, w, g: t * (d + 4 * m) if w else t * (d + 3 * m) * g
    ),
    "d and m are swapped": _kept(lambda t, d, m, w, g: t * (m + 4 * d) if w else 3 * t * d * g),
    "these are numbers, not bytes": lambda tokens, d, m, itemsize, weights_train, input_grad: (
        feed_forward_bytes(tokens, d, m, 1, weights_train, input_grad)
    ),
    "the weights are counted; they exist without the step": lambda tokens, d, m, itemsize, weights_train, input_grad: (
        feed_forward_bytes(tokens, d, m, itemsize, weights_train, input_grad) + 3 * d * m * itemsize
    ),
}


def _cache(**changes: Callable[[dict[str, int]], int]) -> Callable[..., int]:
    def wrong_cache(**sizes: int) -> int:
        return kv_cache_bytes(**(sizes | {name: change(sizes) for name, change in changes.items()}))

    return wrong_cache


CACHE_MISTAKES: dict[str, Callable[..., Any]] = {
    "this is keys or values; both are kept": lambda **sizes: kv_cache_bytes(**sizes) // 2,
    "this counts query heads; grouped queries share kv_heads keys and values": _cache(
        kv_heads=lambda g: g["heads"]
    ),
    "this counts query heads and key-value heads; queries aren't kept": _cache(
        kv_heads=lambda g: g["kv_heads"] + g["heads"]
    ),
    "this counts keys, values and queries; queries aren't kept": lambda **sizes: (
        kv_cache_bytes(**sizes) * 3 // 2
    ),
    "every layer has its own keys and values": _cache(layers=lambda g: 1),
    "every sequence of the batch has its own keys and values": _cache(batch=lambda g: 1),
    "every token so far has its keys and values": _cache(length=lambda g: 1),
    "these are numbers, not bytes": _cache(itemsize=lambda g: 1),
    "itemsize is in bytes already, not in bits": lambda **sizes: kv_cache_bytes(**sizes) // 8,
    "the number of key-value heads is missing: each of them keeps head_dim numbers a token": _cache(
        kv_heads=lambda g: 1
    ),
    "head_dim is missing": _cache(head_dim=lambda g: 1),
    "the length is squared: that is the attention matrix, which isn't kept": _cache(
        length=lambda g: g["length"] ** 2
    ),
}
