"""LoRA linear layer: a frozen linear map plus a trained low-rank one, forward and backward.

    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ          W (out, in), A (r, in), B (out, r), s = lora_alpha / r

Why the fast version is fast, measured against the same formula left to autograd:

- it does not compute a gradient of the frozen W and b, nor of x where nobody asks (the first layer);
- it never materialises s · (x Aᵀ) Bᵀ: both low-rank products are added into the base product's own output
  (`addmm`), forward and backward, so three passes over a (tokens, out) tensor and one over (tokens, in) disappear;
- every product has one side of size r; B A, which is as large as W, is never formed;
- that side comes first, (x Aᵀ)ᵀ = A xᵀ: a matrix library computes a few long rows up to four times as fast as many
  short ones; and each thread does all products for tokens of its own (see `threads`);
- it keeps x and x Aᵀ for the backward pass and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pefttutor.kernels.precision import compute_dtype
from pefttutor.kernels.threads import plain, share

__all__ = ["lora_linear", "lora_linear_reference"]

FEW_TOKENS = 128  # with fewer each thread would read the weight for little work
SMALL = 1 << 24  # multiplications: with fewer, starting threads takes longer than working alone


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """Add a low-rank update to a linear layer, as the paper writes it.

    y = x Wᵀ + b + s · (x Aᵀ) Bᵀ

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

    A weight stored as (in, out), as GPT-2's Conv1D does, is passed as its view `weight.t()`, at no cost.
    The adapter may be kept in a wider dtype than x (float32 next to bfloat16): it is rounded to x's dtype for the
    products, and its gradient comes back in its own. Under `torch.autocast` everything is rounded to autocast's
    dtype. Differentiable once; `torch.func` transforms are not supported (use the reference).

    Shapes: x (…, in), weight (out, in), bias (out) or None, lora_A (r, in), lora_B (out, r) → (…, out).
    Cost: forward 2·T·(in·out + r·(in + out)) FLOPs for T tokens; backward the same plus 2·T·r·(in + out).
        Kept for the backward pass: x (T·in) and x Aᵀ (T·r); transient: the result itself and (T·r).
    Raises: ValueError where the shapes don't fit, TypeError where the dtypes don't.
    Source: Hu et al. 2021, LoRA, eq. 3.
    """
    _check(x, weight, bias, lora_A, lora_B)
    dtype = compute_dtype(x)
    if weight.dtype != x.dtype and dtype == x.dtype:
        raise TypeError(
            f"lora_linear: x is {x.dtype} and weight {weight.dtype}; convert one of them, or use torch.autocast"
        )
    return _LoRALinear.apply(x, weight, bias, lora_A, lora_B, scaling, dtype)


class _LoRALinear(torch.autograd.Function):
    """The formula and its gradients. All products are of 2-D tensors: (tokens, features)."""

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
        _, needs_weight, _, needs_A, needs_B = ctx.needs_input_grad[:5]
        ctx.scaling, ctx.x_dtype, ctx.x_shape = scaling, x.dtype, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        x = x.to(dtype)
        tokens = x.reshape(-1, x.shape[-1])  # (tokens, in)
        y = x.new_empty(len(tokens), len(weight))  # (tokens, out)
        A_x = x.new_empty(len(lora_A), len(tokens))  # (r, tokens)
        base, shift, A = weight.to(dtype).t(), None if bias is None else bias.to(dtype), lora_A.to(dtype)
        B = lora_B.to(dtype).t() * scaling  # (r, out)

        def work(_: int, some: slice) -> None:
            if shift is None:
                torch.mm(tokens[some], base, out=y[some])
            else:
                torch.addmm(shift, tokens[some], base, out=y[some])
            A_x[:, some] = A @ tokens[some].t()
            y[some].addmm_(A_x[:, some].t(), B)

        _by_tokens(work, len(tokens), weight)
        # The parameters exist anyway; x and x Aᵀ are all that this layer makes the step remember.
        ctx.save_for_backward(
            x if needs_A or needs_weight else None, A_x if needs_B else None, weight, lora_A, lora_B
        )
        return y.view(*ctx.x_shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A_x, weight, lora_A, lora_B = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
        dtype = grad.dtype
        grad = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        tokens = x.reshape(-1, x.shape[-1]) if needs_A or needs_weight else grad.new_empty(0)  # (tokens, in)
        base, A, B = weight.to(dtype), lora_A.to(dtype), lora_B.to(dtype).t() * ctx.scaling
        grad_x = grad.new_empty(len(grad), base.shape[1]) if needs_x else None
        parts = len(_parts(len(grad), weight))
        grad_A = grad.new_empty(parts, *A.shape) if needs_A else None
        grad_B = grad.new_empty(parts, *B.shape) if needs_B else None

        def work(part: int, some: slice) -> None:
            delta = grad[some]
            if grad_B is not None:
                torch.mm(A_x[:, some], delta, out=grad_B[part])  # (r, out)
            if grad_A is not None or grad_x is not None:
                B_delta = B @ delta.t()  # (r, tokens)
            if grad_A is not None:
                torch.mm(B_delta, tokens[some], out=grad_A[part])  # (r, in)
            if grad_x is not None:
                torch.mm(delta, base, out=grad_x[some]).addmm_(B_delta.t(), A)

        _by_tokens(work, len(grad), weight)
        return (
            None if grad_x is None else grad_x.view(ctx.x_shape).to(ctx.x_dtype),
            (grad.t() @ tokens).to(weight.dtype) if needs_weight else None,  # (out, in)
            grad.sum(0).to(ctx.bias_dtype) if needs_bias else None,
            None if grad_A is None else grad_A.sum(0).to(lora_A.dtype),
            None if grad_B is None else grad_B.sum(0).t().mul(ctx.scaling).to(lora_B.dtype),
            None,
            None,
        )


def _parts(tokens: int, weight: Tensor) -> list[slice]:
    """Which tokens a thread takes: a part each, if there are enough to fill the processor's matrix units; else all."""
    threads = torch.get_num_threads() if weight.device.type == "cpu" else 1
    size = max(1, math.ceil(tokens / threads))
    if size < FEW_TOKENS or tokens * weight.numel() < SMALL:
        return [slice(0, tokens)]
    return [slice(first, first + size) for first in range(0, max(1, tokens), size)]


def _by_tokens(work: Callable[[int, slice], None], tokens: int, weight: Tensor) -> None:
    """work(i, tokens of part i): by a thread each, by this one alone if it is little, or else by torch's as it does."""
    parts = _parts(tokens, weight)
    if len(parts) > 1 or tokens * weight.numel() < SMALL:
        share(lambda part: work(*part), enumerate(parts), weight.device)
    else:
        with plain(weight.device):
            work(0, parts[0])


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> None:
    """Say what was given and what was expected, before anything is computed."""
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"lora_linear: x is {tuple(x.shape)} and weight {tuple(weight.shape)}, expected x (…, in) and weight "
            "(out, in); pass weight.t() for a layer that stores (in, out), such as GPT-2's Conv1D"
        )
    out_features, in_features = weight.shape
    r = lora_A.shape[0] if lora_A.dim() == 2 else -1
    if lora_A.shape != (r, in_features) or lora_B.shape != (out_features, r):
        raise ValueError(
            f"lora_linear: lora_A is {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)}, expected "
            f"(r, {in_features}) and ({out_features}, r) for a weight of {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"lora_linear: bias is {tuple(bias.shape)}, expected ({out_features},)")
    if not x.is_floating_point() or not lora_A.is_floating_point() or not lora_B.is_floating_point():
        raise TypeError(
            f"lora_linear: x is {x.dtype}, lora_A {lora_A.dtype}, lora_B {lora_B.dtype}; expected floating point"
        )
