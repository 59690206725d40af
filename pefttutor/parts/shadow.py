"""Let a layer compute with another tensor in a parameter's place, without touching the layer's code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

__all__ = ["check_called", "owners", "shadow", "unshadow"]

Make = Callable[[nn.Module, str], Tensor | None]


def shadow(layer: nn.Module, key: str, make: Make) -> None:
    """From now on `layer.key` is, during each forward, what `make(layer, key)` returns (None: the parameter).

    The parameter stays where it is, under its name. It works for every layer that reads `self.key` in its forward,
    since Python looks at an object's own attributes before a module's parameters. `make` must be a module's
    function, so that a copied model is free of the original.
    """
    vars(layer).setdefault("_shadows", {})[key] = make
    if _show not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_show)
        layer.register_forward_hook(_hide, always_call=True)


def unshadow(layer: nn.Module, key: str) -> None:
    """Let the layer compute with its own parameter again."""
    vars(layer)["_shadows"].pop(key)


def owners(model: nn.Module, parameter: Tensor) -> list[tuple[nn.Module, str]]:
    """Every layer that holds the parameter, and what it calls it: more than one where weights are tied."""
    return [
        (layer, key) for layer in model.modules() for key, p in layer._parameters.items() if p is parameter
    ]


def check_called(model: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError if one of the parameters is known to be read without its layer being called.

    nn.MultiheadAttention reads out_proj's, DeBERTa the table rel_embeddings: there a shadow would never be seen.
    """
    for name in names:
        path = name.rpartition(".")[0]
        kind, own = type(model.get_submodule(path)), path.rpartition(".")[2]
        if kind.__name__ == "NonDynamicallyQuantizableLinear" or own == "rel_embeddings":
            raise ValueError(
                f"{name!r} is read without calling its layer {path!r}, so a part of it gets no gradient. "
                f"Train all of it with modules_to_save=({own!r},), or leave it out."
            )


def _show(layer: nn.Module, args: Any) -> None:
    for key, make in vars(layer)["_shadows"].items():
        tensor = make(layer, key)
        if tensor is not None:
            vars(layer)[key] = tensor


def _hide(layer: nn.Module, args: Any, output: Any) -> None:
    for key in vars(layer)["_shadows"]:
        vars(layer).pop(key, None)
