"""LoRA linear layer: a frozen linear map plus a trained low-rank one, forward and backward.

    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ          W (out, in), A (r, in), B (out, r), s = lora_alpha / r

Why the fast version is fast, measured against the same formula left to autograd:

- it does not compute a gradient of the frozen W and b, nor of x where nobody asks (the first layer);
- it never materialises s · (x Aᵀ) Bᵀ: both low-rank products are added into the base product's own output
  (`addmm`), forward and backward, so three passes over a (tokens, out) tensor and one over (tokens, in) disappear;
- every product has one side of size r; B A, which is as large as W, is never formed;
- on a CPU what has r columns is stored column by column: a matrix library computes a few long rows up to four times
  as fast as many short ones;
- it does little but products: where those are short, what a layer costs is the number of its operations;
- it keeps x and x Aᵀ for the backward pass and nothing else.

On a GPU only the sum in one output is kept, and the backward pass is autograd's (`_composed`): a small step waits for
its orders there, and Python gives those of a backward pass more slowly than autograd does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pefttutor.kernels import threads
from pefttutor.kernels.precision import compute_dtype, shared_dtype

__all__ = ["lora_linear", "lora_linear_reference"]


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """Add a low-rank update to a linear layer, as the paper writes it.

    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ

    >>> x, W, A, B = torch.tensor([1.0, 2.0]), torch.ones(1, 2), torch.ones(1, 2), torch.full((1, 1), 10.0)
    >>> lora_linear_reference(x, W, None, A, B, scaling=0.5)            # 3 + ½ · 10 · 3
    tensor([18.])

    Shapes: x (…, in), weight (out, in), bias (out) or None, lora_A (r, in), lora_B (out, r) → (…, out).
    Source: Hu et al. 2021, LoRA, eq. 3.
    """
    low_rank = F.linear(F.linear(x, lora_A.to(x.dtype)), lora_B.to(x.dtype))  # (…, in) → (…, r) → (…, out)
    return F.linear(x, weight, bias) + scaling * low_rank


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """Add a low-rank update to a linear layer: the same function as `lora_linear_reference`, faster and leaner.

    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ

    >>> x, W, A, B = torch.tensor([1.0, 2.0]), torch.ones(1, 2), torch.ones(1, 2), torch.full((1, 1), 10.0)
    >>> lora_linear(x, W, None, A, B, scaling=0.5)                      # 3 + ½ · 10 · 3
    tensor([18.])

    A weight stored as (in, out), as GPT-2's Conv1D does, is passed as its view `weight.t()`, at no cost.
    The adapter may be kept in a wider dtype than x (float32 next to bfloat16): it is rounded to x's dtype for the
    products, and its gradient comes back in its own. Under `torch.autocast` everything is rounded to autocast's
    dtype; a GPU's backward pass within autocast is rounded as a plain layer's is. On a CPU it is differentiable once,
    and `torch.func` transforms are not supported (use the reference).

    Shapes: x (…, in), weight (out, in), bias (out) or None, lora_A (r, in), lora_B (out, r) → (…, out).
    Cost: forward 2·T·(in·out + r·(in + out)) FLOPs for T tokens; backward the same plus 2·T·r·(in + out).
        Kept for the backward pass: x (T·in) and x Aᵀ (T·r); transient: the result itself and (T·r).
    Raises: ValueError where the shapes don't fit, TypeError where the dtypes don't.
    Source: Hu et al. 2021, LoRA, eq. 3.
    """
    if not (x.is_floating_point() and lora_A.is_floating_point() and lora_B.is_floating_point()):
        raise TypeError(
            f"lora_linear: x is {x.dtype}, lora_A {lora_A.dtype}, lora_B {lora_B.dtype}; expected floating point"
        )
    if bias is not None and bias.shape != weight.shape[:1]:  # a shorter one would be repeated
        raise ValueError(_misfit(x, weight, bias, lora_A, lora_B))
    dtype = shared_dtype("lora_linear", x, weight, bias)
    compute = _composed if threads.short_way(x.device) else _apply
    try:
        return compute(x, weight, bias, lora_A, lora_B, scaling, dtype)
    except (RuntimeError, IndexError) as error:  # products look at the other shapes anyway
        raise (ValueError(why) if (why := _misfit(x, weight, bias, lora_A, lora_B)) else error) from None


def _composed(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype
) -> Tensor:
    """The formula with both products in one output, and its backward pass left to autograd, which gives a GPU its
    orders sooner than Python does."""
    tokens = _as(dtype, x).reshape(-1, x.shape[-1])  # (tokens, in)
    x_A = F.linear(tokens, _as(dtype, A))  # (tokens, r)
    y = F.linear(tokens, _as(dtype, weight), None if bias is None else _as(dtype, bias))
    return y.addmm_(x_A, _as(dtype, B).t(), alpha=scaling).view(*x.shape[:-1], B.shape[0])  # (…, out)


class _LoRALinear(torch.autograd.Function):
    """The formula and its gradients, in products of 2-D tensors, (tokens, features).

    For a small layer what costs time is not the products but giving the orders for them. So what is rarely needed (a
    cast, a switch of autocast or of the gradient's own gradient) is asked for, and not done.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        _, needs_weight, _, needs_A, needs_B, _, _ = ctx.needs_input_grad
        ctx.noted = scaling, x.dtype, x.shape, None if bias is None else bias.dtype
        shape, W, A, B = x.shape, weight, lora_A, lora_B
        if not x.dtype == W.dtype == A.dtype == B.dtype == dtype:
            x, W, A, B = (_as(dtype, t) for t in (x, W, A, B))
        tokens = x.reshape(-1, shape[-1])  # (tokens, in)
        y = (
            tokens.mm(W.t()) if bias is None else torch.addmm(_as(dtype, bias), tokens, W.t())
        )  # (tokens, out)
        x_A = A.mm(tokens.t()).t()  # (tokens, r), column by column
        y.addmm_(x_A, B.t(), alpha=scaling)
        # The parameters exist anyway; x and x Aᵀ are all that this layer makes the step remember.
        ctx.save_for_backward(
            x if needs_A or needs_weight else None, x_A if needs_B else None, weight, lora_A, lora_B
        )
        return y.view(*shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or compute_dtype(grad) != grad.dtype:
            return _gradients_once(ctx, grad)
        return _gradients(ctx, grad)


# The usual `apply` prepares for torch.func, which this kernel doesn't support (torch refuses it here too): that takes
# as long as a product of a small layer.
_apply: Any = super(torch.autograd.Function, _LoRALinear).apply


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, x_A, weight, lora_A, lora_B = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_A, needs_B, _, _ = ctx.needs_input_grad
    scaling, x_dtype, x_shape, bias_dtype = ctx.noted
    dtype = grad.dtype
    grad = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
    grad_x = grad_W = grad_A = grad_B = None
    if needs_A or needs_weight:
        tokens = x.reshape(-1, x.shape[-1])  # (tokens, in)
    if needs_B:  # (out, r)
        grad_B = _narrow(grad, *lora_B.shape).addmm_(grad.t(), x_A, beta=0, alpha=scaling)
    if needs_x or needs_A:  # (tokens, r)
        through_B = _narrow(grad, grad.shape[0], lora_B.shape[1])
        through_B.addmm_(grad, _as(dtype, lora_B), beta=0, alpha=scaling)
    if needs_A:  # (r, in)
        grad_A = through_B.t().mm(tokens)
    if needs_x:  # (tokens, in)
        grad_x = grad.mm(_as(dtype, weight)).addmm_(through_B, _as(dtype, lora_A))
        grad_x = _as(x_dtype, grad_x.view(x_shape))
    if needs_weight:  # (out, in)
        grad_W = _as(weight.dtype, grad.t().mm(tokens))
    return (
        grad_x,
        grad_W,
        grad.sum(0).to(bias_dtype) if needs_bias else None,
        None if grad_A is None else _as(lora_A.dtype, grad_A),
        None if grad_B is None else _as(lora_B.dtype, grad_B),
        None,
        None,
    )


@once_differentiable
def _gradients_once(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """In the forward pass's dtypes, also within autocast, and without a graph of their own."""
    with threads.plain(grad.device):
        return _gradients(ctx, grad)


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _narrow(like: Tensor, rows: int, r: int) -> Tensor:
    """Room for (rows, r), column by column: a matrix library likes few long rows."""
    return like.new_empty_strided((rows, r), (1, rows))


def _misfit(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> str | None:
    """What was given and what was expected; None where all fits."""
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        return (
            f"lora_linear: x is {tuple(x.shape)} and weight {tuple(weight.shape)}, expected x (…, in) and weight "
            "(out, in); pass weight.t() for a layer that stores (in, out), such as GPT-2's Conv1D"
        )
    n_out, n_in = weight.shape
    if bias is not None and bias.shape != (n_out,):
        return f"lora_linear: bias is {tuple(bias.shape)}, expected ({n_out},)"
    if lora_B.dim() == 2 and lora_B.shape[0] == n_out and lora_A.shape == (lora_B.shape[1], n_in):
        return None
    return (
        f"lora_linear: lora_A is {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}, expected "
        f"(r, {n_in}) and ({n_out}, r) for a weight of {tuple(weight.shape)}"
    )
