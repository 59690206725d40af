"""What counts as a linear layer, how large it is, and its dense weight: the one place that knows the kinds of layers.

    y = W x + b          W (out, in)

`nn.Linear` stores W as (out, in); GPT-2's `Conv1D` and an embedding, whose input is a one-hot word, as (in, out). A
subclass, such as Falcon's, counts as well if it is seen to compute the same. A layer of another library that keeps its
weight in another form (quantised) needs `in_features`, `out_features` and a linear `forward`; with a method
`dense_weight()` → (out, in) more can be said about it.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "all_linear",
    "dense_weight",
    "is_plain",
    "own_class",
    "sizes",
    "stored_as",
    "transposed",
    "why_not_linear",
]


def _kinds() -> dict[type, bool]:
    """Types of layers, and whether they store (in, out). Without transformers loaded no model has a Conv1D."""
    kinds: dict[type, bool] = {nn.Linear: False, nn.Embedding: True}
    module = sys.modules.get("transformers.pytorch_utils")
    if module is not None:
        kinds[module.Conv1D] = True
    return kinds


def own_class(layer: nn.Module) -> type:
    """The layer's class, without what an attached method has made of it."""
    return next(kind for kind in type(layer).__mro__ if not vars(kind).get("_adapted", False))


def transposed(layer: nn.Module) -> bool:
    """Whether the layer stores its weight as (in, out)."""
    return any(isinstance(layer, kind) and stored for kind, stored in _kinds().items())


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer is exactly an `nn.Linear`, `Conv1D` or `nn.Embedding`, so that its formula is known."""
    return own_class(layer) in _kinds()


def sizes(layer: nn.Module) -> tuple[int, int]:
    """How many features go in and come out.

    >>> sizes(nn.Linear(3, 5)), sizes(nn.Embedding(100, 8))
    ((3, 5), (100, 8))
    """
    if isinstance(layer, tuple(_kinds())) and _has_weight(layer):
        first, second = layer.weight.shape  # type: ignore[union-attr, misc]
        return (first, second) if transposed(layer) else (second, first)
    return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]


def stored_as(layer: nn.Module, weight: Tensor) -> Tensor:
    """A dense (out, in) weight in the layer's own order, or the layer's own as (out, in): it is its own inverse."""
    return weight.t() if transposed(layer) else weight


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight as (out, in), a view where the layer stores it. Raises: ValueError for a layer that can't tell.

    >>> dense_weight(nn.Embedding(100, 8)).shape
    torch.Size([8, 100])
    """
    if _has_weight(layer):
        return stored_as(layer, layer.weight)  # type: ignore[arg-type]
    dense: Any = getattr(layer, "dense_weight", None)
    if callable(dense):
        return dense()
    raise ValueError(
        f"a {own_class(layer).__name__} has no dense weight: it is {_weight_of(layer)}. Its weight can't be read or "
        "merged into; dequantise the layer first."
    )


def _has_weight(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2


def _weight_of(layer: nn.Module) -> str:
    weight = getattr(layer, "weight", None)
    return (
        f"{weight.dtype} {tuple(weight.shape)}"
        if isinstance(weight, Tensor)
        else "not a tensor called weight"
    )


def why_not_linear(layer: nn.Module) -> str | None:
    """Why a change of this layer's weight would not do what it says, or None.

    Cost: for a subclass of a known layer one forward pass of the layer alone.
    """
    kind = type(layer).__name__
    if "forward" in vars(layer):
        return (
            "its forward was replaced on the object (by a device hook?), so a new layer would not be called"
        )
    if kind == "NonDynamicallyQuantizableLinear":
        return "it is a NonDynamicallyQuantizableLinear, which nn.MultiheadAttention reads without calling it"
    if getattr(layer, "max_norm", None) is not None:
        return "it has max_norm, which rewrites its weight in every forward pass"
    if isinstance(layer, tuple(_kinds())):
        return _odd_weight(layer) if own_class(layer) in _kinds() else _differs(layer)
    known = sorted(t.__name__ for t in _kinds())
    kind = f"{type(layer).__module__}.{kind}" if kind in known else kind
    if not all(isinstance(getattr(layer, name, None), int) for name in ("in_features", "out_features")):
        return f"it is a {kind}, not {', '.join(known)} or another layer with in_features and out_features"
    return f"it is a {kind}, made of other layers: name one of those" if any(layer.children()) else None


def _odd_weight(layer: nn.Module) -> str | None:
    if _has_weight(layer) or isinstance(layer, nn.Linear):
        return None  # a quantised nn.Linear computes by itself; nothing is said about its weight
    return f"it has no plain floating-point weight, it is {_weight_of(layer)}"


def _differs(layer: Any) -> str | None:
    """Why a subclass isn't taken for what it inherits from: it computes something else with its weight."""
    if not _has_weight(layer) or layer.weight.is_meta:
        return None
    n_in, _ = sizes(layer)
    weight, bias = stored_as(layer, layer.weight), getattr(layer, "bias", None)
    x: Tensor
    if isinstance(layer, nn.Embedding):
        x = torch.arange(min(n_in, 3), device=weight.device)
        expected = weight.t()[x]
    else:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3, n_in, generator=generator).to(weight)
        expected = F.linear(x, weight, bias)
    try:
        with torch.no_grad():
            # What attached methods have changed isn't asked: it builds on what the layer's own class computes.
            kind: Any = own_class(layer)
            compute = partial(kind.forward, layer) if hasattr(layer, "_adapted") else layer
            given, expected = compute(x), expected.detach()
    except Exception as error:
        return f"it is a {type(layer).__name__}, which doesn't take an input alone ({type(error).__name__}: {error})"
    near = 1e-2 if weight.dtype.itemsize < 4 else 1e-4
    if not isinstance(given, Tensor) or given.shape != expected.shape:
        return f"it is a {type(layer).__name__}, which gives something else than W x + b"
    if not torch.allclose(given, expected, rtol=near, atol=near * float(expected.abs().max())):
        return f"it is a {type(layer).__name__}, which computes something else than W x + b with its weight"
    return None


def all_linear(model: nn.Module, without: set[nn.Module]) -> dict[str, nn.Module]:
    """Every linear layer but the output head, embeddings, and those in `without`, by name.

    >>> list(all_linear(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.ReLU()), set()))
    ['1']
    """
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return {
        name: layer
        for name, layer in model.named_modules()
        if not isinstance(layer, nn.Embedding)
        and (isinstance(layer, tuple(_kinds())) or hasattr(layer, "in_features"))
        and layer is not head
        and layer not in without
        and why_not_linear(layer) is None
    }
