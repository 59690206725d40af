"""Find the layers of a model by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable

import torch
from torch import nn

from pefttutor.parts.called import read_past
from pefttutor.parts.linear import all_linear, why_not_linear

__all__ = ["check_called_in_evaluation", "find_modules", "linear_targets"]

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
    why_not: Callable[[nn.Module], str | None] | None = None,
    *,
    field: str = "target_modules",
) -> dict[str, nn.Module]:
    """The modules that `names` means, each once, in the model's order.

    A collection holds whole names or their last parts ("q_proj" finds every "….q_proj"), and each must find
    something. A string is a regular expression that must match the whole name. `why_not` says why a module can't be
    taken, or None. `field` is what the error calls `names`.

    >>> list(find_modules(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ("0",)))
    ['0']

    Raises: ValueError, with the names that exist, if a name finds nothing or something that can't be taken.
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
        raise ValueError(f"{field}: this model has no {_listed(missing)}.{hint} {_choices(modules, why_not)}")
    for name, module in ((name, module) for module, name in found.items()):
        reason = why_not(module) if why_not else None
        if reason:
            raise ValueError(f"{field}: {name!r} can't be adapted: {reason}. {_choices(modules, why_not)}")
    return {name: module for module, name in found.items()}


def linear_targets(
    model: nn.Module,
    target_modules: str | Collection[str],
    modules_to_save: Collection[str] = (),
    *,
    why_not: Callable[[nn.Module], str | None] = why_not_linear,
    field: str = "target_modules",
) -> dict[str, nn.Module]:
    """The linear layers that `target_modules` means; "all-linear" is all of them but the head and `modules_to_save`.

    why_not: lets others than linear layers in. field: what the error calls `target_modules`.

    Raises: ValueError as `find_modules`, and for a layer that is also part of `modules_to_save`.
    """
    saved = find_modules(model, modules_to_save, field="modules_to_save") if modules_to_save else {}
    inside = {part: name for name, module in saved.items() for part in module.modules()}
    if target_modules == "all-linear":
        found = all_linear(model, set(inside))
        past = _read_past(model, found)
        found = {name: layer for name, layer in found.items() if name not in past}
        if not found:
            raise ValueError(f"{field} is 'all-linear', and this model has no linear layer but its head.")
        check_called_in_evaluation(model, found, field)
        return found
    found = find_modules(model, target_modules, why_not, field=field)
    for name in _read_past(model, found):
        raise ValueError(
            f"{field}: {name!r} can't be adapted: this model reads its weight without calling it, so the change "
            "would have no effect. Train all of it with modules_to_save, or leave it out."
        )
    check_called_in_evaluation(model, found, field)
    for name, layer in found.items():
        if layer in inside:
            raise ValueError(
                f"{name!r} is a target and part of {inside[layer]!r} in modules_to_save: it can be only one."
            )
    return found


def _read_past(model: nn.Module, layers: dict[str, nn.Module]) -> list[str]:
    weights = {name: layer._parameters.get("weight") for name, layer in layers.items()}
    past = read_past(model, [w for w in weights.values() if w is not None])
    return [name for name, weight in weights.items() if id(weight) in past]


def check_called_in_evaluation(model: nn.Module, names: Iterable[str], field: str) -> None:
    """Raise ValueError if one of the layers is called in training alone. `field`: what the error calls them."""
    for name in names if torch.backends.mha.get_fastpath_enabled() else ():
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
            raise ValueError(
                f"{field}: {name!r} can't be adapted: in evaluation nn.TransformerEncoderLayer reads its weight "
                "without calling it; switch that off with torch.backends.mha.set_fastpath_enabled(False)."
            )


def _choices(modules: dict[str, nn.Module], why_not: Callable[[nn.Module], str | None] | None) -> str:
    """The last parts of the names that exist, each once, and what is usual for such a model."""
    fit = [name for name, module in modules.items() if why_not is None or why_not(module) is None]
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in fit))
    if not endings:
        return "It has no layer that can be adapted."
    more = f" and {len(endings) - 40} more" if len(endings) > 40 else ""
    text = f"It has: {', '.join(endings[:40])}{more}."
    typical = next((choice for choice in TYPICAL if set(choice) <= set(endings)), None)
    return f"{text} Usual for it: {typical}." if typical and why_not is not None else text


def _listed(words: Collection[str]) -> str:
    *some, final = [repr(word) for word in words]
    return f"{', '.join(some)} and {final}" if some else final
