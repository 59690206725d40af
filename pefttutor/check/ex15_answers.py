"""Notebook 15, DoRA, and 15b, its gradient: the right answers, and what learners write instead, each with its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# ---- the reference solutions


def dora_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    lora_alpha: float,
) -> Tensor:
    """y = x (c ⊙ V)ᵀ + b,   V = W₀ + (α/r) B A,   c = m / ‖V‖ of each row, the norm a constant for the gradient."""
    changed = weight + lora_alpha / lora_A.shape[0] * (lora_B @ lora_A)
    ratio = magnitude / changed.norm(dim=1).detach()
    return F.linear(x, ratio[:, None] * changed, bias)


def direction_gradient(grad: Tensor, changed: Tensor, magnitude: Tensor, detach: bool) -> Tensor:
    """∂L/∂V from G = ∂L/∂W', W' = m ⊙ V/‖V‖: c ⊙ G, and without `detach` only what is orthogonal to each row of V."""
    norm = changed.norm(dim=1, keepdim=True)
    unit = changed / norm
    if not detach:
        grad = grad - (grad * unit).sum(1, keepdim=True) * unit
    return magnitude[:, None] / norm * grad


# ---- what learners write instead


def _row_norm(changed: Tensor, weight: Tensor, delta: Tensor) -> Tensor:
    return changed.norm(dim=1).detach()


def _forward(
    *,
    scaling: Callable[[float, int], float] = lambda alpha, r: alpha / r,
    norm: Callable[[Tensor, Tensor, Tensor], Tensor] = _row_norm,
    ratio: Callable[[Tensor, Tensor], Tensor] = lambda m, norm: m / norm,
    scale_bias: bool = False,
    use_bias: bool = True,
    changed_by: Callable[[Tensor, Tensor], Tensor] = lambda weight, delta: weight + delta,
) -> Callable[..., Tensor]:
    """norm(V, W₀, ΔW) of each row; ratio(m, norm); changed_by(W₀, ΔW): what is multiplied by the ratio."""

    def wrong_forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude: Tensor,
        lora_alpha: float,
    ) -> Tensor:
        delta = scaling(lora_alpha, lora_A.shape[0]) * (lora_B @ lora_A)
        c = ratio(magnitude, norm(weight + delta, weight, delta))
        y = F.linear(x, c[..., None] * changed_by(weight, delta))
        if bias is None or not use_bias:
            return y
        return y + (c * bias if scale_bias else bias)

    return wrong_forward


def _branch_alone(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    lora_alpha: float,
) -> Tensor:
    delta = lora_alpha / lora_A.shape[0] * (lora_B @ lora_A)
    c = magnitude / (weight + delta).norm(dim=1).detach()
    return F.linear(x, weight + c[:, None] * delta, bias)


FORWARD_MISTAKES: dict[str, Callable[..., Any]] = {
    "the norm is taken over each column, an input: torch's weight is (out, in), so take it over dim=1": _forward(
        norm=lambda changed, weight, delta: changed.norm(dim=0).detach()
    ),
    "each column, an input, is divided by its norm: torch's weight is (out, in), so take it over dim=1": _forward(
        changed_by=lambda weight, delta: (weight + delta) / (weight + delta).norm(dim=0).detach(),
        ratio=lambda m, norm: m,
    ),
    "this is one norm of the whole matrix; each row has its own": _forward(
        norm=lambda changed, weight, delta: changed.norm().detach().expand(len(changed))
    ),
    "the norm takes part in the gradient: detach it": _forward(
        norm=lambda changed, weight, delta: changed.norm(dim=1)
    ),
    "the bias is scaled, too": _forward(scale_bias=True),
    "the bias is missing": _forward(use_bias=False),
    "the scaling α/r is missing": _forward(scaling=lambda alpha, r: 1.0),
    "the scaling is α instead of α/r": _forward(scaling=lambda alpha, r: alpha),
    "this is the norm of W₀; it is that of W₀ + ΔW that is divided by": _forward(
        norm=lambda changed, weight, delta: weight.norm(dim=1)
    ),
    "this is the norm of ΔW; it is that of W₀ + ΔW that is divided by": _forward(
        norm=lambda changed, weight, delta: delta.norm(dim=1).detach()
    ),
    "the norm is squared": _forward(norm=lambda changed, weight, delta: changed.square().sum(1).detach()),
    "the magnitude is missing: every row has the length 1": _forward(ratio=lambda m, norm: 1 / norm),
    "the rows aren't divided by their norm": _forward(ratio=lambda m, norm: m),
    "the ratio is upside down: m / norm": _forward(ratio=lambda m, norm: norm / m),
    "the magnitude is cut off from the graph (.data or .detach())": _forward(
        ratio=lambda m, norm: m.detach() / norm
    ),
    "W₀ isn't in what is scaled, only ΔW is": _forward(changed_by=lambda weight, delta: delta),
    "the ratio multiplies ΔW only; it multiplies all of W₀ + ΔW": _branch_alone,
    "the factors are cut off from the graph: detach the norm, not W₀ + ΔW": _forward(
        changed_by=lambda weight, delta: (weight + delta).detach()
    ),
    "the norm is made without α/r": lambda x, weight, bias, lora_A, lora_B, magnitude, lora_alpha: _forward(
        norm=lambda changed, weight, delta: (weight + lora_B @ lora_A).norm(dim=1).detach()
    )(x, weight, bias, lora_A, lora_B, magnitude, lora_alpha),
}


def _along(grad: Tensor, unit: Tensor) -> Tensor:
    return (grad * unit).sum(1, keepdim=True) * unit


def _gradient(
    *,
    axis: int = 1,
    along: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda grad, changed, unit: _along(grad, unit),
    sign: float = -1.0,
    when: Callable[[bool], bool] = lambda detach: not detach,
    factor: Callable[[Tensor, Tensor], Tensor] = lambda m, norm: m / norm,
    keep: float = 1.0,
) -> Callable[..., Tensor]:
    def wrong_gradient(grad: Tensor, changed: Tensor, magnitude: Tensor, detach: bool) -> Tensor:
        norm = changed.norm(dim=axis, keepdim=True)
        if when(detach):
            grad = keep * grad + sign * along(grad, changed, changed / norm)
        return factor(magnitude[:, None], norm) * grad

    return wrong_gradient


GRADIENT_MISTAKES: dict[str, Callable[..., Any]] = {
    "`detach` is the wrong way round: detached, the gradient keeps its part along the row": _gradient(
        when=lambda detach: detach
    ),
    "the part along the row is left in although the norm isn't detached": _gradient(
        when=lambda detach: False
    ),
    "the part along the row is taken out although the norm is detached": _gradient(when=lambda detach: True),
    "the part along the row is added instead of subtracted": _gradient(sign=1.0),
    "this is the part along the row; what is left without it is asked for": _gradient(sign=1.0, keep=0.0),
    "the row isn't divided by its norm before it is projected on": _gradient(
        along=lambda grad, changed, unit: _along(grad, changed)
    ),
    "the row is divided by its norm once; both times it stands there as a unit vector": _gradient(
        along=lambda grad, changed, unit: (grad * changed).sum(1, keepdim=True) * unit
    ),
    "the projection is on the columns: sum over dim=1": _gradient(
        along=lambda grad, changed, unit: (grad * unit).sum(0, keepdim=True) * unit
    ),
    "the projection is on the whole matrix; each row has its own": _gradient(
        along=lambda grad, changed, unit: (grad * changed).sum() / changed.square().sum() * changed
    ),
    "the magnitude is missing": _gradient(factor=lambda m, norm: 1 / norm),
    "the norm is missing": _gradient(factor=lambda m, norm: m),
    "the ratio is upside down: m / norm": _gradient(factor=lambda m, norm: norm / m),
    "m / norm is missing: by the chain rule it multiplies everything": _gradient(
        factor=lambda m, norm: torch.ones_like(m)
    ),
    "the norm is taken over the columns: dim=1 is that of the rows": _gradient(axis=0),
}
