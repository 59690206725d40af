"""Keys and values before those of a text, in every layer: seen by the model as those of words that a cache holds.

    K ← [P_K; K]      V ← [P_V; V]

The cache of a call stays as it is, and holds the text alone. What the model gets is a copy of it, whose layers answer
with the prefix before what they hold, and count it; so masks and positions come out as the model makes them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor

__all__ = ["empty", "real_one", "with_prefix"]

# The index of a layer, its keys and values (batch, heads, n, head_dim) → the same with more before them.
Extend = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


def empty(config: Any) -> Any:
    """A cache without tokens, of the layers that a config asks for."""
    from transformers import DynamicCache, EncoderDecoderCache

    if not getattr(config, "is_encoder_decoder", False):
        return DynamicCache(config=config)
    return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))


def real_one(cache: Any) -> Any:
    """The cache that holds the text alone, of which this one is a copy or is the one itself."""
    return vars(cache).get("_pefttutor_real", cache)


def with_prefix(cache: Any, layers: list[int], count: int, extend: Extend, *, stores: bool = True) -> Any:
    """A copy of the cache in which so many keys and values come before those of each layer.

    What is added to the copy, the cache itself has, too; with `stores` false nobody has.
    """
    shown = copy.copy(cache)
    vars(shown)["_pefttutor_real"] = real_one(cache)
    if hasattr(cache, "self_attention_cache"):
        own = cache.self_attention_cache
        shown.self_attention_cache = with_prefix(own, layers, count, extend, stores=stores)
        return shown
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= max(layers):
        cache.layers.append(cache.layer_class_to_replicate())  # as it would in its first call
    shown.layers = [
        _before(layer, i, count, extend, stores) if i in layers else layer
        for i, layer in enumerate(cache.layers)
    ]
    return shown


def _before(layer: Any, index: int, count: int, extend: Extend, stores: bool) -> Any:
    shown = copy.copy(layer)
    kind: Any = type(layer)
    shown.__class__ = _widened(kind)
    vars(shown)["_prefix"] = layer, index, count, extend, stores
    return shown


@lru_cache(maxsize=32)
def _widened(kind: type[Any]) -> type[Any]:
    """The class of a cache's layer, with a prefix before what it holds."""

    def update(self: Any, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        layer, index, _, extend, stores = self._prefix
        if stores:
            keys, values = layer.update(keys, values, *args, **kwargs)
        return extend(index, keys, values)

    def get_seq_length(self: Any, *args: Any) -> Any:
        layer, _, count, *_ = self._prefix
        return layer.get_seq_length(*args) + count

    def get_mask_sizes(self: Any, *args: Any) -> tuple[int, int]:
        layer, _, count, *_ = self._prefix
        length, offset = layer.get_mask_sizes(*args)
        return length + count, offset

    own = {
        "update": update,
        "get_seq_length": get_seq_length,
        "get_mask_sizes": get_mask_sizes,
        "_layer_type": None,
    }
    return type(f"Prefixed{kind.__name__}", (kind,), own)
