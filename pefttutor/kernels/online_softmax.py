"""The loss of an output head on a CPU: each thread reads a range of the vocabulary, for all tokens at hand.

    −log softmax(z)[label] = log Σᵥ exp(zᵥ − top) + top − z_label        top = max z, Σ and top kept while z passes by

When a larger logit comes, what was summed is scaled down (the online softmax), so the logits themselves are needed
for a few words at a time: they become exponentials, and a sum of their rows of the head weighted by these, in one
small piece of memory. The head, which is large, is read once for 1,024 tokens, or for 256 if it trains.

Source: Milakov & Gimelshein 2018, arXiv:1805.02867, algorithm 3.
"""

from __future__ import annotations

import math
from functools import partial, reduce

import torch
from torch import Tensor

from pefttutor.kernels import threads

__all__ = ["add_product", "sum_of_losses"]

MAX_BYTES = 1 << 23  # of logits at a time: what a processor's caches hold
TOKENS = 1024  # at a time: the head is read once for them
TOKENS_TRAINED = 256  # at a time if the head trains: all their logits are needed until the softmax is known


def sum_of_losses(
    hidden: Tensor,
    head: Tensor,
    shift: Tensor | None,
    labels: Tensor,
    grads: list[Tensor | None],
    *,
    ignore_index: int,
    max_bytes: int | None,
) -> Tensor:
    """Σ −log softmax(z)[label] over the labelled tokens; its gradients are added to `grads` where there are some.

    >>> hidden, head, labels = torch.ones(3, 2), torch.zeros(4, 2), torch.tensor([0, 3, -100])
    >>> sum_of_losses(hidden, head, None, labels, [None] * 3, ignore_index=-100, max_bytes=None)   # 2 · log 4
    tensor(2.7726)

    Shapes: hidden (tokens, d), head (vocabulary, d), shift (vocabulary) or None, labels (tokens); grads as hidden,
    head and shift → (). Computes in the head's dtype.
    """
    grad_hidden, grad_weight, grad_bias = grads
    trained = grad_weight is not None or grad_bias is not None
    losses = []
    for rows in (labels != ignore_index).nonzero().flatten().split(TOKENS_TRAINED if trained else TOKENS):
        h, own = hidden[rows].to(head.dtype), labels[rows]
        words = _split(
            h, own, head, shift, grad_hidden is not None, None if trained else max_bytes or MAX_BYTES
        )
        threads.share(_Words.read, words, h.device)
        top = torch.stack([some.top for some in words]).amax(0)  # (tokens, 1)
        total = reduce(torch.add, (some.scale_to(top).total for some in words))
        own_logits = reduce(torch.add, (some.label_logits for some in words))
        losses.append(total.log() + (top - own_logits))  # the difference of the large ones first
        if grad_hidden is not None:
            mixed = reduce(torch.add, (some.mixed for some in words))
            grad_hidden[rows] = mixed.div_(total).sub_(head[own]).to(grad_hidden.dtype)
        if trained:
            add = partial(_Words.add_to_head, grad_weight=grad_weight, grad_bias=grad_bias, total=total)
            threads.share(add, words, h.device)
    return torch.cat(losses).sum()


def _split(
    h: Tensor, labels: Tensor, head: Tensor, shift: Tensor | None, mixes: bool, max_bytes: int | None
) -> list[_Words]:
    """A range of the vocabulary for each thread, and room for max_bytes of logits together, or for all of them."""
    count = torch.get_num_threads()
    size = math.ceil(len(head) / count)
    n = size
    if max_bytes is not None:
        each = 8 if h.element_size() == 2 else h.element_size()  # a half is there thrice: also in float32
        n = max(1, min(size, max_bytes // (count * max(1, len(h)) * each)))
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
            add_product(self.mixed, z, head)
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
            add_product(grad_weight[words], difference.t(), self.h)
        if grad_bias is not None:
            grad_bias[words] += difference.sum(0)


def _inside(labels: Tensor, words: int) -> Tensor:
    return ((labels >= 0) & (labels < words)).nonzero().squeeze(1)


def add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    """into += left @ right, computed in right's dtype.

    >>> total = torch.ones(1, 1)
    >>> add_product(total, torch.tensor([[2.0, 3.0]]), torch.tensor([[10.0], [100.0]]))
    >>> total                                                           # 1 + 20 + 300
    tensor([[321.]])
    """
    if into.dtype == right.dtype:
        into.addmm_(left.to(right.dtype), right)
    else:
        into += left.to(right.dtype) @ right
