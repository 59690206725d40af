"""Everything about a model that a method must put back: classes, attributes, hooks, flags, and every bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

HOOKS = [
    name for name in vars(nn.Linear(1, 1)) if "hooks" in name
]  # every table of hooks that a module has, whatever torch adds later


def picture(model: nn.Module) -> dict[str, Any]:
    """What the model is, by what is looked at; two pictures of an unchanged model are equal."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"{path}: object, class, mode"] = (id(module), type(module), module.training)
        found[f"{path}: attributes"] = frozenset(vars(module))
        found[f"{path}: buffers that aren't saved"] = frozenset(module._non_persistent_buffers_set)
        for table in [table for table in HOOKS if vars(module)[table]]:
            hooks = list(vars(module)[table].values())  # or flags of hooks in another table
            found[f"{path}: {table}"] = sorted(map(id, hooks))
            others = [id(hook) for hook in hooks if callable(hook) and not ours(hook)]
            if others:
                found[f"{path}: the order of others' {table}"] = others
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[f"{name}: object, flag, gradient"] = (
            id(parameter),
            parameter.requires_grad,
            parameter.grad is None,
        )
    found["state"] = list(model.state_dict())
    config = getattr(model, "config", None)
    found["config"] = None if config is None else config.to_dict()
    return found | {f"{name}: bits": bits for name, bits in tensors(model).items()}


def ours(hook: Any) -> bool:
    """Whether the package has registered this hook."""
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("pefttutor")


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter and buffer."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach().clone() for name, tensor in named}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What isn't the same in two pictures, or in two sets of tensors."""
    keys = before.keys() | after.keys()
    return sorted(key for key in keys if not _same(before.get(key), after.get(key)))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other
