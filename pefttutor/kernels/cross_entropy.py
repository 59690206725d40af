"""Output head and cross-entropy in one: the loss of a language model without its logits.

    loss = mean over the labelled tokens t of  log Σᵥ exp(zₜᵥ) − zₜ,label(t)      with z = h Wᵀ + b

Why the fast version is fast and small, measured against logits followed by `F.cross_entropy`:

- it does not keep the logits, their log-softmax or a gradient of them, three tensors of (tokens, vocabulary):
  one chunk of tokens after another is turned into logits, loss and gradient in the same piece of memory;
- it does not compute logits of tokens whose label is ignored, such as the prompt or the padding;
- it does not compute a gradient of a frozen head; without one, each thread takes chunks of its own.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pefttutor.kernels.precision import compute_dtype
from pefttutor.kernels.threads import share

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100
) -> Tensor:
    """Mean cross-entropy of the logits that an output head gives.

    loss = mean over t with label(t) ≠ ignore_index of −log softmax(hₜ Wᵀ + b)[label(t)]

    Shapes: hidden (tokens, d), weight (vocabulary, d), labels (tokens), bias (vocabulary) or None → ().
    """
    logits = F.linear(hidden, weight, bias)  # (tokens, vocabulary)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels, ignore_index=ignore_index)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    chunk: int = 256,
) -> Tensor:
    """Mean cross-entropy of an output head: the same function as the reference, never holding all the logits.

    loss = mean over t with label(t) ≠ ignore_index of −log softmax(hₜ Wᵀ + b)[label(t)]

    The gradient is computed along with the loss, while a chunk's logits are at hand, and only where one is asked
    for. `chunk` tokens are treated at a time: a smaller chunk needs less memory but reads the head more often.
    Without any label the loss is NaN, as in the reference. Differentiable once.

    Shapes: hidden (tokens, d), weight (vocabulary, d), labels (tokens), bias (vocabulary) or None → ().
    Cost: for T labelled tokens 2·T·d·V FLOPs for the loss and as many for hidden's gradient (as many again for
        the head's, if it trains). Kept for the backward pass: one tensor like hidden (and one like the head, if it
        trains); transient: chunk·V logits.
    Raises: ValueError where the shapes don't fit or a label isn't in the vocabulary, TypeError for labels that
        aren't integers.
    """
    _check(hidden, weight, labels, bias, chunk)
    kept = (labels != ignore_index).nonzero().flatten()
    if kept.numel():
        low, high = (int(end) for end in labels[kept].aminmax())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(
                f"linear_cross_entropy: labels reach from {low} to {high}, expected 0 … {weight.shape[0] - 1} "
                f"(the vocabulary) or {ignore_index} (ignored)"
            )
    grad_wanted = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(
        hidden, weight, bias, labels, kept, chunk, grad_wanted, compute_dtype(hidden)
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients, chunk by chunk; the backward pass only multiplies by the incoming number."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        kept: Tensor,
        chunk: int,
        grad_wanted: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        needs = [grad_wanted and needed for needed in ctx.needs_input_grad[:3]]
        grads = [
            torch.zeros_like(t) if needed and t is not None else None
            for t, needed in zip((hidden, weight, bias), needs, strict=True)
        ]
        grad_hidden, grad_weight, grad_bias = grads
        head = weight.to(dtype)
        shift = None if bias is None else bias.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        losses = hidden.new_zeros(len(kept), dtype=wide)
        trained = needs[1] or needs[2]  # then all chunks add to the head's gradient
        threads = 1 if trained or hidden.device.type != "cpu" else torch.get_num_threads()
        some = math.ceil(min(chunk, len(kept)) / threads)
        buffers = [hidden.new_empty(some, len(head), dtype=dtype) for _ in range(threads)]

        def work(piece: tuple[Tensor, Tensor]) -> None:
            rows, loss = piece
            h = hidden[rows].to(dtype)  # (chunk, d)
            buffer = buffers.pop()  # a thread's own, given back below
            product = torch.mm if shift is None else partial(torch.addmm, shift)
            logits = product(h, head.t(), out=buffer[: len(rows)]).to(wide)  # (chunk, vocabulary)
            loss.copy_(_loss_and_gradient_(logits, labels[rows], 1 / len(kept)))
            grad_logits = logits.to(dtype)  # (chunk, vocabulary)
            if grad_hidden is not None:
                grad_hidden[rows] = (grad_logits @ head).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.add_(grad_logits.t() @ h)
            if grad_bias is not None:
                grad_bias.add_(grad_logits.sum(0))
            buffers.append(buffer)

        pieces = zip(kept.split(some), losses.split(some), strict=True) if len(kept) else ()
        if threads == 1:
            for piece in pieces:
                work(piece)
        else:
            share(work, pieces, hidden.device)
        ctx.save_for_backward(*grads)
        return losses.sum() / len(kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors]
        return *scaled, None, None, None, None, None


def _loss_and_gradient_(logits: Tensor, labels: Tensor, scale: float, rows_at_once: int = 8) -> Tensor:
    """Return each row's cross-entropy and replace the logits by its gradient, scale · (softmax − one-hot).

    A few rows at a time, so that they stay in the processor's cache from the first operation to the last.
    """
    labels = labels[:, None]  # (chunk, 1)
    loss = -logits.gather(1, labels)
    for block, out in zip(logits.split(rows_at_once), loss.split(rows_at_once), strict=True):
        top = block.amax(1, keepdim=True)
        total = block.sub_(top).exp_().sum(1, keepdim=True)
        out += total.log() + top  # log Σ exp(z)
        block.mul_(scale / total)
    logits.scatter_add_(1, labels, torch.full_like(loss, -scale))
    return loss.squeeze(1)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, chunk: int) -> None:
    shapes_fit = hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
    if (
        not shapes_fit
        or labels.shape != hidden.shape[:1]
        or (bias is not None and bias.shape != weight.shape[:1])
    ):
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels "
            f"{tuple(labels.shape)}, bias {None if bias is None else tuple(bias.shape)}; expected (tokens, d), "
            "(vocabulary, d), (tokens), (vocabulary) or None: flatten batch and sequence first"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"linear_cross_entropy: labels are {labels.dtype}, expected torch.int64")
    if chunk < 1:
        raise ValueError(f"linear_cross_entropy: chunk is {chunk}, expected at least 1")
