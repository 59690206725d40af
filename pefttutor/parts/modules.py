"""Find the layers of a model by name, and put others in their place without losing what hangs on them."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TypeVar

import torch
from torch import nn

__all__ = ["adopt", "find_modules", "replace_module"]

Layer = TypeVar("Layer", bound=nn.Module)

# What papers and libraries usually adapt: Llama and ViT, BERT, GPT-2, T5, DistilBERT, GPT-NeoX.
TYPICAL = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("c_attn",),
    ("q", "v"),
    ("q_lin", "v_lin"),
    ("query_key_value",),
)


def find_modules(
    model: nn.Module,
    names: str | Collection[str],
    types: Collection[type] | None = None,
    *,
    field: str = "target_modules",
) -> dict[str, nn.Module]:
    """The modules that `names` means, each once, in the model's order.

    A collection holds whole names or their last parts ("q_proj" finds every "….q_proj"), and each must find
    something. A string is a regular expression that must match the whole name. `types` are the types that can
    be adapted (None: any), exactly: a subclass may use its weight in another way (`nn.MultiheadAttention` never
    calls its out_proj), and what is added to it would be ignored without a word. `field` is what the error
    calls `names`.

    Raises: ValueError, with the names that exist, if a name finds nothing or something that can't be adapted.
    """
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    try:
        if isinstance(names, str):
            patterns = {names: re.compile(names)}
        else:
            patterns = {name: re.compile(rf"(.*\.)?{re.escape(name)}") for name in names}
    except re.error as error:
        raise ValueError(f"{field}: {names!r} is not a regular expression: {error}") from error
    found: dict[nn.Module, str] = {}  # by module, because a layer that is shared has several names
    for name, module in modules.items():
        if any(pattern.fullmatch(name) for pattern in patterns.values()):
            found.setdefault(module, name)

    missing = [name for name, pattern in patterns.items() if not any(map(pattern.fullmatch, modules))]
    if missing:
        hint = f" (A string is a regular expression for the whole name; for endings write ({names!r},).)"
        hint = hint if isinstance(names, str) else ""
        raise ValueError(f"{field}: this model has no {_listed(missing)}.{hint} {_choices(modules, types)}")
    for name in found.values():
        reason = _why_not(modules, name, types)
        if reason:
            raise ValueError(f"{field}: {name!r} can't be adapted: {reason}. {_choices(modules, types)}")
    return {name: module for module, name in found.items()}


def _why_not(modules: dict[str, nn.Module], name: str, types: Collection[type] | None) -> str | None:
    """Why a layer would ignore what is put in its place, or None."""
    module, parent = modules[name], modules.get(name.rpartition(".")[0])
    if types is None:
        return None
    if type(module) not in types:
        known, kind = [t.__name__ for t in types], type(module).__name__
        kind = f"{type(module).__module__}.{kind}" if kind in known else kind
        return f"it is a {kind}, not {_listed(known, 'or')}"
    if "forward" in vars(module):
        return (
            "its forward was replaced on the object (by a device hook?), so a new layer would not be called"
        )
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        return (
            "in evaluation nn.TransformerEncoderLayer reads its weight without calling it; "
            "switch that off with torch.backends.mha.set_fastpath_enabled(False)"
        )
    return None


def _choices(modules: dict[str, nn.Module], types: Collection[type] | None) -> str:
    """The last parts of the names that exist, each once, and what is usual for such a model."""
    fit = [name for name, module in modules.items() if types is None or type(module) in types]
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in fit))
    if not endings:
        return "It has no layer that can be adapted."
    more = f" and {len(endings) - 40} more" if len(endings) > 40 else ""
    text = f"It has: {', '.join(endings[:40])}{more}."
    typical = next((choice for choice in TYPICAL if set(choice) <= set(endings)), None)
    return f"{text} Usual for it: {typical}." if typical and types is not None else text


def _listed(words: Collection[str], last: str = "and") -> str:
    *some, final = [repr(word) if last == "and" else word for word in words]
    return f"{', '.join(some)} {last} {final}" if some else final


def adopt(cls: type[Layer], layer: nn.Module) -> Layer:
    """A `cls` that takes over all that `layer` holds: the very same parameters, buffers, hooks and flags.

    `cls` is a subclass of the layer's class; its `__init__` is not called. Hook tables are shared rather than
    copied, so that a handle that someone keeps can still remove its hook.
    """
    new = cls.__new__(cls)
    own = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    vars(new).update({key: value.copy() if key in own else value for key, value in vars(layer).items()})
    return new


def replace_module(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put `new` wherever the module called `name` stands (a shared layer has several places); return it."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():
            if child is old:
                parent._modules[child_name] = new
    return new
