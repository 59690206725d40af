"""Output head and cross-entropy in one: the loss of a language model without its logits.

    loss = mean over the labelled tokens t of  log Σᵥ exp(zₜᵥ) − zₜ,label(t)      with z = h Wᵀ + b

Why the fast version is fast and small, measured against logits followed by `F.cross_entropy`:

- it does not keep the logits, their log-softmax or a gradient of them, three tensors of (tokens, vocabulary): those
  of a few words (on a CPU, see `online_softmax`) or tokens at a time become a loss and a gradient, and are dropped;
- on a CPU it does not compute logits of tokens whose label is ignored, such as the prompt or the padding;
- it does not compute a gradient of a frozen head.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pefttutor.kernels import threads
from pefttutor.kernels.online_softmax import add_product, sum_of_losses
from pefttutor.kernels.precision import shared_dtype

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]

MAX_BYTES = 1 << 27  # of logits at a time where the short way is taken: enough tokens to keep a GPU busy
ROWS_TRAINED = 1024  # at a time there if the head trains: a half can't hold the sum over many more


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, ignore_index: int = -100
) -> Tensor:
    """Mean cross-entropy of the logits that an output head gives.

    loss = mean over t with label(t) ≠ ignore_index of −log softmax(hₜ Wᵀ + b)[label(t)]

    >>> hidden, head, labels = torch.ones(3, 2), torch.zeros(4, 2), torch.tensor([0, 3, -100])
    >>> linear_cross_entropy_reference(hidden, head, labels)            # four words, equally likely: log 4
    tensor(1.3863)

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
    max_bytes: int | None = None,
) -> Tensor:
    """Mean cross-entropy of an output head: the same function as the reference, never holding all the logits.

    loss = mean over t with label(t) ≠ ignore_index of −log softmax(hₜ Wᵀ + b)[label(t)]

    The gradient is computed along with the loss, while logits are at hand, and only where one is asked for.
    Without any label the loss is NaN, as in the reference. Differentiable once.

    >>> hidden, head, labels = torch.ones(3, 2), torch.zeros(4, 2), torch.tensor([0, 3, -100])
    >>> linear_cross_entropy(hidden, head, labels)                      # four words, equally likely: log 4
    tensor(1.3863)

    max_bytes: of the logits that exist at a time; None: 8 MiB on a CPU, 128 MiB on a GPU. If the head trains, on a
        CPU they are those of 256 tokens, whatever that is.

    Shapes: hidden (tokens, d), weight (vocabulary, d), labels (tokens), bias (vocabulary) or None → ().
    Cost: for T labelled tokens 2·T·d·V FLOPs for the loss and as many for hidden's gradient (as many again for
        the head's, if it trains). Kept for the backward pass: one tensor like hidden (and one like the head, in
        float32, if it trains); transient: max_bytes, and for each thread one tensor like hidden (at most 1,024 tokens).
        On a GPU T counts all tokens, since asking which are labelled would make it wait.
    Raises: ValueError where the shapes don't fit or a label isn't in the vocabulary (on a GPU CUDA's own error comes,
        later), TypeError for labels that aren't integers, and for tensors of dtypes that a linear layer refuses.
    Source: the online softmax is Milakov & Gimelshein 2018, arXiv:1805.02867, algorithm 3.
    """
    _check(hidden, weight, labels, bias, max_bytes)
    dtype = shared_dtype("linear_cross_entropy", hidden, weight, bias)
    if not threads.short_way(hidden.device):
        _check_labels(labels, weight.shape[0], ignore_index)
    grad_wanted = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(
        hidden, weight, bias, labels, ignore_index, max_bytes, grad_wanted, dtype
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients at once; the backward pass only multiplies by the incoming number."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ignore_index: int,
        max_bytes: int | None,
        grad_wanted: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        # Of the sum over tokens: the mean's would lose digits in a half, and the head's sum overflow it.
        grads = [
            torch.zeros_like(t, dtype=kind) if grad_wanted and needed and t is not None else None
            for t, needed, kind in zip(
                (hidden, weight, bias), ctx.needs_input_grad[:3], (hidden.dtype, wide, wide), strict=True
            )
        ]
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        head, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
        losses = _sum_of_losses if threads.short_way(hidden.device) else sum_of_losses
        loss = losses(hidden, head, shift, labels, grads, ignore_index=ignore_index, max_bytes=max_bytes)
        count = (labels != ignore_index).sum()
        ctx.save_for_backward(count, *grads)
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count, *grads = ctx.saved_tensors
        # In float32, whatever the gradients are: GradScaler's first scale is infinite in float16.
        grad = grad / count.clamp(min=1)
        scaled = [
            None if sums is None else (sums.to(grad.dtype) * grad).to(dtype)
            for sums, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None, None


def _sum_of_losses(
    hidden: Tensor,
    head: Tensor,
    shift: Tensor | None,
    labels: Tensor,
    grads: list[Tensor | None],
    *,
    ignore_index: int,
    max_bytes: int | None,
) -> Tensor:
    """`online_softmax.sum_of_losses` as it is short for a GPU: many tokens at a time, and nothing is asked of it.

    Which tokens count isn't known here then: the others are computed too, and left out of every sum.
    """
    wide = torch.promote_types(head.dtype, torch.float32)
    # Twice a row of logits: there is their log-softmax too.
    rows = max(1, (max_bytes or MAX_BYTES) // (2 * wide.itemsize * head.shape[0]))
    if grads[1] is not None:
        rows = min(rows, ROWS_TRAINED)
    ignored = labels == ignore_index
    own, minus_one = labels.masked_fill(ignored, 0)[:, None], hidden.new_full((1, 1), -1, dtype=wide)
    losses = []
    for first in range(0, hidden.shape[0], rows):
        some = slice(first, first + rows)
        h = hidden[some].to(head.dtype)
        p = F.linear(h, head, shift).to(wide).log_softmax(1)  # (rows, vocabulary)
        losses.append(F.nll_loss(p, labels[some], ignore_index=ignore_index, reduction="sum"))
        if any(grad is not None for grad in grads):
            p.exp_().scatter_add_(1, own[some], minus_one.expand(len(h), 1))  # softmax(z) − one-hot
            of_hidden = None if grads[0] is None else grads[0][some]
            _add_gradients(h, head, p, ignored[some, None], (of_hidden, *grads[1:]))
        del p  # the next one needs its room
    if grads[0] is not None:
        grads[0].masked_fill_(ignored[:, None], 0)
    return reduce(torch.add, losses) if losses else hidden.new_zeros((), dtype=wide)


def _add_gradients(
    h: Tensor, head: Tensor, difference: Tensor, ignored: Tensor, grads: tuple[Tensor | None, ...]
) -> None:
    """Of a few tokens. Shapes: difference, softmax(z) − one-hot, (rows, vocabulary), ignored (rows, 1)."""
    grad_hidden, grad_weight, grad_bias = grads
    if grad_hidden is not None and grad_hidden.dtype == head.dtype:
        torch.mm(difference.to(head.dtype), head, out=grad_hidden)
    elif grad_hidden is not None:
        grad_hidden.copy_(difference.to(head.dtype) @ head)
    if grad_weight is not None or grad_bias is not None:
        difference.masked_fill_(ignored, 0)
    if grad_weight is not None:
        # Padding may be NaN, and 0 · NaN too.
        add_product(grad_weight, difference.t(), h.masked_fill(ignored, 0))
    if grad_bias is not None:
        grad_bias += difference.sum(0)


def _check_labels(labels: Tensor, words: int, ignore_index: int) -> None:
    kept = labels[labels != ignore_index]
    if not kept.numel():
        return
    low, high = (int(end) for end in kept.aminmax())
    if low < 0 or high >= words:
        raise ValueError(
            f"linear_cross_entropy: labels reach from {low} to {high}, expected 0 … {words - 1} "
            f"(the vocabulary) or {ignore_index} (ignored)"
        )


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, max_bytes: int | None
) -> None:
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
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"linear_cross_entropy: max_bytes is {max_bytes}, expected at least 1")
