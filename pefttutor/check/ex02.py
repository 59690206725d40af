"""Checks of notebook 02: bytes that stand still, bytes kept of a feed-forward layer, bytes of a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.check.compare import same_result
from pefttutor.check.core import exercise
from pefttutor.check.ex02_answers import (
    CACHE_MISTAKES,
    FEED_FORWARD_MISTAKES,
    STATIC_MISTAKES,
    feed_forward_bytes,
    kv_cache_bytes,
    static_bytes,
)


class _Mixed(nn.Module):
    """A frozen base in bfloat16 whose head is tied to its embedding, a trained adapter in float32, a buffer."""

    def __init__(self, trained: tuple[str, ...]) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, dtype=torch.bfloat16)
        self.up = nn.Linear(6, 10, dtype=torch.bfloat16)
        self.adapter = nn.Linear(6, 3)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", torch.zeros(7))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in trained)


def _as_whole(attempt: Callable[..., Any]) -> Callable[..., Any]:
    """A byte is a byte: 8.0 and a tensor that holds 8 are as good as 8, a list as good as a tuple."""

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(map(plain, value))
        if isinstance(value, Tensor) and value.ndim == 0:
            value = value.item()
        return int(value) if isinstance(value, float) and value.is_integer() else value

    return lambda **inputs: plain(attempt(**inputs))


@exercise("02.1", reference=static_bytes)
def ex02_1(attempt: Any) -> None:
    """Two dtypes, a tied weight, a buffer; one part frozen, then another; moments in 4 bytes and in 1."""
    for trained, moment_bytes in (
        (("adapter.weight", "adapter.bias"), 4),
        (("up.bias", "adapter.weight"), 1),
    ):
        inputs = {"model": _Mixed(trained), "moment_bytes": moment_bytes}
        same_result(_as_whole(attempt), static_bytes, inputs, mistakes=STATIC_MISTAKES)


@exercise("02.2", reference=feed_forward_bytes)
def ex02_2(attempt: Any) -> None:
    """All four combinations of what trains and what needs a gradient."""
    for weights_train, input_grad in ((False, True), (True, True), (True, False), (False, False)):
        inputs = {"tokens": 5, "d": 7, "m": 11, "itemsize": 2}
        inputs |= {"weights_train": weights_train, "input_grad": input_grad}
        same_result(_as_whole(attempt), feed_forward_bytes, inputs, mistakes=FEED_FORWARD_MISTAKES)


@exercise("02.3", reference=kv_cache_bytes)
def ex02_3(attempt: Any) -> None:
    """With grouped queries, with one key-value head, and with as many as there are queries."""
    sizes = {"layers": 11, "head_dim": 16, "batch": 5, "length": 7}
    for heads, kv_heads, itemsize in ((12, 3, 4), (6, 1, 2), (5, 5, 2)):
        inputs = sizes | {"heads": heads, "kv_heads": kv_heads, "itemsize": itemsize}
        same_result(_as_whole(attempt), kv_cache_bytes, inputs, mistakes=CACHE_MISTAKES)
