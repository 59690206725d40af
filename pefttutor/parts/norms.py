"""Which layers are normalisations, and which parameters of a model are theirs."""

from __future__ import annotations

from torch import nn

from pefttutor.parts.freezing import whole

__all__ = ["is_norm", "norm_parameters"]


def norm_parameters(model: nn.Module) -> list[str]:
    """The names of the base's scales γ and shifts β that a method may train.

    >>> norm_parameters(nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)))
    ['1.weight', '1.bias']
    """
    layers = [layer for layer in model.modules() if is_norm(layer)]
    norms = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
    base = set(whole(model))
    return [name for name, p in model.named_parameters() if id(p) in norms and name in base]


def is_norm(layer: nn.Module) -> bool:
    """Whether it scales and shifts each token's features by vectors, whatever its author calls it (gated, NoNorm)."""
    changes = vars(layer).get("_changes", {}).values()
    added = {key for change in changes for key in change.added_keys}
    vectors = [p for key, p in layer._parameters.items() if p is not None and key not in added]
    named = "norm" in type(layer).__name__.lower() and not any(layer.children())
    if not named or not vectors or "running_mean" in layer._buffers:
        return False
    return all(p.dim() == 1 for p in vectors)
