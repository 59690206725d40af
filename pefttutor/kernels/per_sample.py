"""Each sample's own gradient of a layer's parameter, from what went into the layer and what came back to it.

A batch's gradient is a sum over samples. Before the sum there is, for input a (B, T, in) and gradient δ (B, T, out)
at the output y of

    y = a Wᵀ + b:     G_W[s] = δ[s]ᵀ a[s]           G_b[s] = Σ_t δ[s, t]
    y = a W + b:      G_W[s] = a[s]ᵀ δ[s]           (GPT-2's Conv1D stores W as (in, out))
    y = E[ids]:       G_E[s, v] = Σ_{t: ids[s, t] = v} δ[s, t]
    y = γ · x̂ + β:    G_γ[s] = Σ_t δ[s, t] · x̂[s, t]

which costs what the batch's own gradient costs. B gradients at once would be B times as large as the parameter, so
they are made one after the other, and of a large parameter some rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["kind_of", "knows", "own_squares", "rows", "scaled_input", "squares", "vectors"]


def kind_of(layer: nn.Module) -> str | None:
    """Which of the formulas is the layer's. Exact types, because a subclass may compute something else; by name
    for those that libraries define themselves."""
    name = type(layer).__name__
    if type(layer) is nn.Linear or name == "Conv1D":
        return "linear" if name == "Linear" else "conv1d"
    if type(layer) is nn.Embedding:
        plain = layer.max_norm is None and not layer.scale_grad_by_freq
        return "embedding" if plain else None
    if type(layer) is nn.LayerNorm or name.endswith("RMSNorm"):
        weight = getattr(layer, "weight", None)
        return "norm" if isinstance(weight, Tensor) and weight.dim() == 1 else None
    return None


def knows(layer: nn.Module) -> bool:
    """Whether this file has the formula of each of the layer's own parameters."""
    return kind_of(layer) is not None and set(layer._parameters) <= {"weight", "bias"}


def vectors(layer: nn.Module, name: str, a: Tensor, delta: Tensor) -> Tensor:
    """All samples' gradients of a bias or of a norm's weight. Shapes: (B, T, in), (B, T, out) → (B, out)."""
    return delta.sum(1) if name == "bias" else (delta * a).sum(1)


def rows(layer: nn.Module, a: Tensor, delta: Tensor, first: int, into: Tensor, *, keep: bool = False) -> None:
    """One sample's gradient of rows first, first + 1, … of the layer's weight matrix, as many as `into` has.

    Overwrites `into`, or adds to it (keep). Shapes: a (T, in), for an embedding ids (T); delta (T, out);
    into (rows, …).
    """
    kind, last = kind_of(layer), first + len(into)
    if kind == "linear":
        into.addmm_(delta[:, first:last].t(), a, beta=int(keep))  # (rows, in)
    elif kind == "conv1d":
        into.addmm_(a[:, first:last].t(), delta, beta=int(keep))  # (rows, out)
    else:
        wanted = (a >= first) & (a < last) & _counts(layer, a)  # (T)
        (into if keep else into.zero_()).index_add_(0, a[wanted] - first, delta[wanted])


def squares(
    uses: list[tuple[nn.Module, str, Tensor, Tensor]], into: Tensor, *, samples: int, max_bytes: int
) -> None:
    """Add Σ_s G[s]² to `into`, where G[s] is the sum over all uses of one parameter (a tied weight has several)."""
    if into.dim() == 1:
        gradients = torch.stack([vectors(*use) for use in uses]).sum(0)  # (B, out)
        into += gradients.to(into.dtype).square_().sum(0)
        return
    delta = uses[0][3]
    step = max(1, max_bytes // (into.shape[1] * delta.element_size()))
    buffer = delta.new_empty(
        min(step, len(into)), into.shape[1]
    )  # one for all samples: it stays in the cache
    for first in range(0, len(into), step):
        part = into[first : first + step]
        for s in range(samples):
            gradient = buffer[: len(part)]
            for i, (layer, _, a, delta) in enumerate(uses):
                rows(layer, a[s], delta[s], first, gradient, keep=i > 0)
            gradient = gradient.to(part.dtype)
            part.addcmul_(gradient, gradient)


def own_squares(layer: nn.Module, name: str, a: Tensor, delta: Tensor, into: Tensor) -> bool:
    """Shorter ways for a parameter with a single use, where there is one; returns whether there was.

    One token a sample: G² = δ²ᵀ a², a product of two matrices. An embedding: only the rows that occur.
    """
    kind = kind_of(layer)
    if name == "weight" and kind in ("linear", "conv1d") and a.shape[1] == 1:
        a, delta = (x[:, 0].to(into.dtype).square() for x in (a, delta))
        into.addmm_(*(delta.t(), a) if kind == "linear" else (a.t(), delta))
        return True
    if kind != "embedding":
        return False
    sample, position = _counts(layer, a).nonzero(as_tuple=True)
    ids = a[sample, position]
    pairs, which = torch.unique(sample * len(into) + ids, return_inverse=True)  # (sample, row) that occur
    summed = into.new_zeros(len(pairs), into.shape[1])
    summed.index_add_(0, which, delta[sample, position].to(into.dtype))
    into.index_add_(0, pairs % len(into), summed.square())
    return True


def _counts(layer: Any, ids: Tensor) -> Tensor:
    """Where an embedding's row gets a gradient: not at its padding index."""
    return torch.ones_like(ids, dtype=torch.bool) if layer.padding_idx is None else ids != layer.padding_idx


def scaled_input(layer: nn.Module, x: Tensor) -> Tensor:
    """x̂ of a norm y = γ · x̂ + β (or (1 + γ) · x̂): what γ multiplies, whatever the layer does to get it."""
    zero = {name: torch.zeros_like(p) for name, p in layer.named_parameters(recurse=False)}
    one = zero | {"weight": torch.ones_like(zero["weight"])}
    forward = type(layer).forward
    with torch.no_grad():
        at_one, at_zero = (_with(layer, values, forward, x) for values in (one, zero))
    return at_one - at_zero


def _with(layer: nn.Module, values: dict[str, Tensor], forward: Any, x: Tensor) -> Tensor:
    """The layer's forward with other parameters, without its hooks."""
    try:
        vars(layer).update(values)  # found before the registered parameters
        return forward(layer, x)
    finally:
        for name in values:
            vars(layer).pop(name)
