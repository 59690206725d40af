"""A linear map of which most entries are zero: the few values train, forward and backward.

    y = x Sᵀ          S (out, in) has k values at fixed places, and zeros elsewhere

Half a percent or three percent of a matrix are too many for sparse products to be faster than dense ones. So S is
formed, once in the forward and once in the backward pass, and freed at once; autograd would keep it, for every layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pefttutor.kernels import threads
from pefttutor.kernels.flat_entries import put
from pefttutor.kernels.precision import compute_dtype

__all__ = ["sparse_linear"]


def sparse_linear(x: Tensor, values: Tensor, index: Tensor, n_out: int) -> Tensor:
    """Multiply by a matrix that holds `values` at the flat places `index`, and zeros elsewhere.

    y = x Sᵀ,   S.flatten()[index] = values

    >>> x, values = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 100.0])
    >>> sparse_linear(x, values, torch.tensor([1, 3]), n_out=2)         # S = [[0, 10, 0], [100, 0, 0]]
    tensor([ 20., 100.])

    The values may be kept in a wider dtype than x: they are rounded to x's dtype (to autocast's, where that is on) for
    the products, and their gradient comes back in their own. It is differentiable once.

    Shapes: x (…, in), values (k), index (k) with each place of (out, in) at most once → (…, out).
    Cost: forward 2·T·in·out FLOPs for T tokens, backward twice that. Kept for the backward pass: x (T·in) where the
        values train; transient: (out, in) twice.
    Raises: ValueError where there aren't as many places as values.
    Source: Han et al. 2024, SLTrain, arXiv:2406.02214, algorithm 1, where S is added to a product of thin factors.
    """
    if values.shape != index.shape or index.dim() != 1:
        raise ValueError(
            f"sparse_linear: values is {tuple(values.shape)} and index {tuple(index.shape)}, expected (k) and (k)"
        )
    return _SparseLinear.apply(x, values, index, n_out, compute_dtype(x))


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, index: Tensor, n_out: int, dtype: torch.dtype) -> Tensor:
        needs_x, needs_values, *_ = ctx.needs_input_grad
        n_in = x.shape[-1]
        ctx.noted = x.dtype, values.dtype, n_out, n_in
        x = x.to(dtype)
        ctx.save_for_backward(x if needs_values else None, values if needs_x else None, index)
        with threads.plain(x.device):
            return x @ _dense(values, index, n_out, n_in, dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, values, index), (x_dtype, values_dtype, n_out, n_in) = ctx.saved_tensors, ctx.noted
        needs_x, needs_values, *_ = ctx.needs_input_grad
        grad_x = grad_values = None
        with threads.plain(grad.device):
            if needs_x:
                S = _dense(values, index, n_out, n_in, grad.dtype)
                grad_x = (grad @ S).to(x_dtype)
            if needs_values:
                whole = grad.reshape(-1, n_out).t() @ x.reshape(-1, n_in)  # (out, in)
                grad_values = whole.view(-1).index_select(0, index).to(values_dtype)
        return grad_x, grad_values, None, None, None


def _dense(values: Tensor, index: Tensor, n_out: int, n_in: int, dtype: torch.dtype) -> Tensor:
    """S (out, in)."""
    S = values.new_zeros(n_out, n_in, dtype=dtype)
    put(S, index, values.detach().to(dtype))
    return S
