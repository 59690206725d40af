"""Output head and cross-entropy in one: the loss of a language model without its logits.

    loss = mean over the labelled tokens t of  log Σᵥ exp(zₜᵥ) − zₜ,label(t)      with z = h Wᵀ + b

Why the fast version is fast and small, measured against logits followed by `F.cross_entropy`:

- it does not keep the logits, their log-softmax or a gradient of them, three tensors of (tokens, vocabulary): a few
  words at a time become logits, their exponentials, and a sum of their rows of the head weighted by these, in one
  small piece of memory; when a larger logit comes, what was summed is scaled down (the online softmax);
- each thread takes a range of the vocabulary for all tokens, so that the head, which is large, is read once;
- it does not compute logits of tokens whose label is ignored, such as the prompt or the padding;
- it does not compute a gradient of a frozen head.
"""

from __future__ import annotations

import math
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pefttutor.kernels.precision import compute_dtype
from pefttutor.kernels.threads import share

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]

TOKENS = 1024  # at a time: the head is read once for them
TOKENS_TRAINED = 256  # at a time if the head trains: all their logits are needed until the softmax is known


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
    max_bytes: int = 1 << 23,
) -> Tensor:
    """Mean cross-entropy of an output head: the same function as the reference, never holding all the logits.

    loss = mean over t with label(t) ≠ ignore_index of −log softmax(hₜ Wᵀ + b)[label(t)]

    The gradient is computed along with the loss, while logits are at hand, and only where one is asked for.
    Without any label the loss is NaN, as in the reference. Differentiable once.

    max_bytes: of the logits that exist at a time. If the head trains they are those of 256 tokens, whatever that is.

    Shapes: hidden (tokens, d), weight (vocabulary, d), labels (tokens), bias (vocabulary) or None → ().
    Cost: for T labelled tokens 2·T·d·V FLOPs for the loss and as many for hidden's gradient (as many again for
        the head's, if it trains). Kept for the backward pass: one tensor like hidden (and one like the head, in
        float32, if it trains); transient: max_bytes, and for each thread one tensor like hidden (at most 1,024 tokens).
    Raises: ValueError where the shapes don't fit or a label isn't in the vocabulary, TypeError for labels that
        aren't integers.
    Source: the online softmax is Milakov & Gimelshein 2018, arXiv:1805.02867, algorithm 3.
    """
    _check(hidden, weight, labels, bias, max_bytes)
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
        hidden, weight, bias, labels, kept, max_bytes, grad_wanted, compute_dtype(hidden)
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
        kept: Tensor,
        max_bytes: int,
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
        grad_hidden, grad_weight, grad_bias = grads
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        trained = grad_weight is not None or grad_bias is not None
        head, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
        losses = []
        for rows in kept.split(TOKENS_TRAINED if trained else TOKENS):
            h, own = hidden[rows].to(dtype), labels[rows]
            words = _split(h, own, head, shift, grad_hidden is not None, None if trained else max_bytes)
            share(_Words.read, words, hidden.device)
            top = torch.stack([some.top for some in words]).amax(0)  # (tokens, 1)
            total = reduce(torch.add, (some.scale_to(top).total for some in words))
            own_logits = reduce(torch.add, (some.label_logits for some in words))
            losses.append(total.log() + (top - own_logits))  # the difference of the large ones first
            if grad_hidden is not None:
                mixed = reduce(torch.add, (some.mixed for some in words))
                grad_hidden[rows] = mixed.div_(total).sub_(head[own]).to(hidden.dtype)
            if trained:
                add = partial(_Words.add_to_head, grad_weight=grad_weight, grad_bias=grad_bias, total=total)
                share(add, words, hidden.device)
        ctx.save_for_backward(*grads)
        ctx.tokens = len(kept)
        return torch.cat(losses).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In float32, whatever the gradients are: GradScaler's first scale is infinite in float16.
        grad = grad / max(ctx.tokens, 1)
        scaled = [
            None if sums is None else (sums.to(grad.dtype) * grad).to(dtype)
            for sums, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None, None


def _split(
    h: Tensor, labels: Tensor, head: Tensor, shift: Tensor | None, mixes: bool, max_bytes: int | None
) -> list[_Words]:
    """A range of the vocabulary for each thread, and room for max_bytes of logits together, or for all of them."""
    threads = torch.get_num_threads() if h.device.type == "cpu" else 1
    size = math.ceil(len(head) / threads)
    n = size
    if max_bytes is not None:
        each = (
            8 if h.element_size() == 2 else h.element_size()
        )  # half precision is there thrice: also in float32
        n = max(1, min(size, max_bytes // (threads * max(1, len(h)) * each)))
    return [
        _Words(h, labels - i, head[i : i + size], None if shift is None else shift[i : i + size], i, n, mixes)
        for i in range(0, len(head), size)
    ]


class _Words:
    """A range of the vocabulary, and what is summed up over it, relative to the largest logit so far.

    Shapes: h (tokens, d); labels (tokens), counted from the range's first word; head (words, d); shift (words) or None;
    room (tokens, n), for the logits of n words at a time; top and total (tokens, 1): max z and Σ exp(z − top);
    label_logits (tokens, 1): z[label] where the label is in the range, else 0; mixed (tokens, d): Σ exp(z − top) · W.
    """

    def __init__(
        self, h: Tensor, labels: Tensor, head: Tensor, shift: Tensor | None, first: int, n: int, mixes: bool
    ) -> None:
        self.h, self.labels, self.head, self.shift, self.first = h, labels, head, shift, first
        self.room = h.new_empty(len(h), n)
        wide = torch.promote_types(h.dtype, torch.float32)
        self.top = h.new_full((len(h), 1), torch.finfo(wide).min, dtype=wide)
        self.total, self.label_logits = torch.zeros_like(self.top), torch.zeros_like(self.top)
        self.mixed = torch.zeros_like(h if mixes else h[:, :0], dtype=wide)  # empty: nobody asks

    def read(self) -> None:
        n = self.room.shape[1]
        for first in range(0, len(self.head), n):
            self._read(slice(first, first + n), self.labels - first)

    def _read(self, words: slice, labels: Tensor) -> None:
        head = self.head[words]  # (n, d)
        product = torch.mm if self.shift is None else partial(torch.addmm, self.shift[words])
        z = product(self.h, head.t(), out=self.room[:, : len(head)]).to(self.top.dtype)  # (tokens, n)
        here = _inside(labels, len(head))
        self.label_logits[here, 0] = z[here, labels[here]]
        self.scale_to(torch.maximum(self.top, z.amax(1, keepdim=True)))
        for part, top, total in zip(*(t.split(64) for t in (z, self.top, self.total)), strict=True):
            total += part.sub_(top).exp_().sum(1, keepdim=True)  # 64 rows stay in the processor's cache
        if self.mixed.numel():
            _add_product(self.mixed, z, head)
        self.exponentials = z

    def scale_to(self, top: Tensor) -> _Words:
        """Let the sums be relative to a larger logit."""
        self.smaller = (self.top - top).exp_()
        self.top = top
        self.total *= self.smaller
        self.mixed *= self.smaller
        return self

    def add_to_head(self, grad_weight: Tensor | None, grad_bias: Tensor | None, total: Tensor) -> None:
        """Gradients of weight and bias, (softmax(z) − one-hot)ᵀ h, where all words were read at once."""
        difference = self.exponentials.mul_(self.smaller / total)
        here = _inside(self.labels, len(self.head))
        difference[here, self.labels[here]] -= 1
        words = slice(self.first, self.first + len(self.head))
        if grad_weight is not None:
            _add_product(grad_weight[words], difference.t(), self.h)
        if grad_bias is not None:
            grad_bias[words] += difference.sum(0)


def _inside(labels: Tensor, words: int) -> Tensor:
    return ((labels >= 0) & (labels < words)).nonzero().squeeze(1)


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    """into += left @ right, computed in right's dtype."""
    if into.dtype == right.dtype:
        into.addmm_(left.to(right.dtype), right)
    else:
        into += left.to(right.dtype) @ right


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, max_bytes: int) -> None:
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
    if max_bytes < 1:
        raise ValueError(f"linear_cross_entropy: max_bytes is {max_bytes}, expected at least 1")
