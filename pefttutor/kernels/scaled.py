"""Scale each feature of what a layer puts out by a number of its own, which is learned.

    y = u ⊙ c          u (…, out), c (out);   ∂/∂u = g ⊙ c,   ∂/∂c = Σ over the tokens of g ⊙ u

Left to autograd, g ⊙ u, which is only summed, and g ⊙ c exist at the same time. Here one takes the other's room: on a
CPU, where fresh memory costs as much as the product that fills it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pefttutor.kernels import threads

__all__ = ["scaled", "scaled_reference"]


def scaled_reference(u: Tensor, c: Tensor) -> Tensor:
    """u ⊙ c as it is written. Shapes: (…, out), (out) → (…, out)."""
    return u * c


def scaled(u: Tensor, c: Tensor) -> Tensor:
    """u ⊙ c: the same function as the reference, in dtypes and derivatives too.

    >>> scaled(torch.ones(2, 3), torch.tensor([1.0, 2.0, 3.0]))
    tensor([[1., 2., 3.],
            [1., 2., 3.]])

    Shapes: u (…, out), c (out) → (…, out).
    Cost: for T tokens T·out FLOPs forward and three times as many backward. Kept for the backward pass: u where
        c has a gradient, and c where u has; transient: the gradient of u.
    """
    if threads.short_way(u.device) or u.dtype != c.dtype or u.dim() < 2:
        return scaled_reference(u, c)
    return _Scaled.apply(u, c)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, c: Tensor) -> Tensor:
        needs_u, needs_c = ctx.needs_input_grad
        ctx.save_for_backward(u if needs_c else None, c if needs_u else None)
        return u * c

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, c = ctx.saved_tensors
        needs_u, needs_c = ctx.needs_input_grad
        product = grad * u if needs_c else None
        grad_c = None if product is None else product.flatten(0, -2).sum(0)
        if not needs_u:
            return None, grad_c
        # While a graph of this pass is made, the product has a gradient of its own and keeps its room.
        free = product is not None and not torch.is_grad_enabled()
        return torch.mul(grad, c, out=product) if free else grad * c, grad_c
