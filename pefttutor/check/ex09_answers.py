"""Notebook 09: the right answers, and those that learners write instead, each with its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# ---- the reference solutions


def true_fisher(x: Tensor, weight: Tensor) -> Tensor:
    """Softmax regression: F[c, j] = mean over s of p[s, c] (1 − p[s, c]) x[s, j]². (B, d), (C, d) → (C, d)."""
    p = (x @ weight.T).softmax(-1)
    return (p * (1 - p)).T @ x.square() / len(x)


def squared_gradients(a: Tensor, delta: Tensor) -> Tensor:
    """Σ_s (Σ_t δ[s, t] a[s, t]ᵀ)² of a linear layer's weight. (B, T, in), (B, T, out) → (out, in)."""
    return torch.einsum("bto,bti->boi", delta, a).square().sum(0)


def fish_masks(fisher: Mapping[str, Tensor], fraction: float, head: str) -> dict[str, Tensor]:
    """The head, and the k = ⌊fraction · N⌋ − |head| entries with the largest information among the others."""
    body = {name: value for name, value in fisher.items() if not name.startswith(head + ".")}
    flat = torch.cat([value.flatten() for value in body.values()])
    everything = sum(value.numel() for value in fisher.values())
    k = int(fraction * everything) - (everything - len(flat))
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.topk(k).indices] = True
    parts = dict(zip(body, mask.split([value.numel() for value in body.values()]), strict=True))
    return {
        name: parts[name].view(value.shape) if name in body else torch.ones_like(value, dtype=torch.bool)
        for name, value in fisher.items()
    }


# ---- what learners write instead


def _probabilities(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight.T).softmax(-1)


def _from_p(factor: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """mean over s of factor(p) x²."""
    return lambda x, weight: factor(_probabilities(x, weight)).T @ x.square() / len(x)


def _with_likeliest_label(x: Tensor, weight: Tensor) -> Tensor:
    p = _probabilities(x, weight)
    score = torch.nn.functional.one_hot(p.argmax(-1), p.shape[-1]) - p
    return score.square().T @ x.square() / len(x)


def _softmax_over_samples(x: Tensor, weight: Tensor) -> Tensor:
    p = (x @ weight.T).softmax(0)
    return (p * (1 - p)).T @ x.square() / len(x)


def _means_first(x: Tensor, weight: Tensor) -> Tensor:
    p = _probabilities(x, weight)
    return torch.outer((p * (1 - p)).mean(0), x.mean(0).square())


TRUE_FISHER_MISTAKES = {
    "softmax runs over the samples; it belongs over the classes, the last axis": _softmax_over_samples,
    "this is the sum over the samples; the information is their mean": lambda x, weight: (
        len(x) * true_fisher(x, weight)
    ),
    "x isn't squared: the gradient holds x, so its square holds x²": lambda x, weight: (
        lambda p: (p * (1 - p)).T @ x / len(x)
    )(_probabilities(x, weight)),
    "p² is the squared gradient for the labels that aren't c alone; average over all labels": _from_p(
        torch.square
    ),
    "(1 − p)² is the squared gradient for the label c alone; average over all labels": _from_p(
        lambda p: (1 - p).square()
    ),
    "only the likeliest label is used; each label counts with its probability": _with_likeliest_label,
    "every label counts the same here; weigh it with its probability": _from_p(
        lambda p: (1 - p).square() + (p.shape[-1] - 1) * p.square()
    ),
    "x is averaged before it is squared; each sample has its own square": _means_first,
    "p is missing: this is 1 − p": _from_p(lambda p: 1 - p),
    "rows are classes and columns inputs, as in the weight; this is transposed": lambda x, weight: (
        true_fisher(x, weight).T
    ),
    "this is the standard deviation of the gradient: the square root is too much": lambda x, weight: (
        true_fisher(x, weight).sqrt()
    ),
}


def _outer(a: Tensor, delta: Tensor) -> Tensor:
    return torch.einsum("bto,bti->boi", delta, a)


SQUARED_MISTAKES = {
    "the samples are added before squaring: that is the square of the batch's gradient": lambda a, delta: (
        _outer(a, delta).sum(0).square()
    ),
    "every token is squared on its own; a sample's gradient is the sum over its tokens": lambda a, delta: (
        torch.einsum("bto,bti->oi", delta.square(), a.square())
    ),
    "rows are outputs and columns inputs, as in the weight; this is transposed": lambda a, delta: (
        squared_gradients(a, delta).T
    ),
    "this is the mean over the samples; the sum is asked for": lambda a, delta: (
        squared_gradients(a, delta) / len(a)
    ),
    "nothing is squared: this is the batch's gradient": lambda a, delta: _outer(a, delta).sum(0),
    "the absolute value is taken in place of the square": lambda a, delta: _outer(a, delta).abs().sum(0),
    "only the last token counts here; every token used the weight": lambda a, delta: squared_gradients(
        a[:, -1:], delta[:, -1:]
    ),
    "tokens are added before the product; a token's δ belongs to its own input": lambda a, delta: (
        squared_gradients(a.sum(1, keepdim=True), delta.sum(1, keepdim=True))
    ),
    "δ² and a² are summed over the tokens each on its own": lambda a, delta: torch.einsum(
        "bo,bi->oi", delta.square().sum(1), a.square().sum(1)
    ),
    "this is the mean over tokens; a gradient is the sum over them": lambda a, delta: (
        squared_gradients(a, delta) / a.shape[1] ** 2
    ),
    "the samples aren't added up: one matrix for each came back": lambda a, delta: _outer(a, delta).square(),
    "the mean over the samples is subtracted: that is a variance": lambda a, delta: (
        (_outer(a, delta) - _outer(a, delta).mean(0)).square().sum(0)
    ),
}

TIES = "`>= limit` takes every entry that ties with the k-th, so more than k train; take k indices"


def _masks(
    *,
    is_head: Callable[[str, str], bool] = lambda name, head: name.startswith(head + "."),
    count: Callable[[float, int, int], int] = lambda fraction, n, head: int(fraction * n) - head,
    head_mask: bool | None = True,
    competes: bool = False,
    together: bool = True,
    choose: Callable[[Tensor, int], Tensor] | None = None,
) -> Callable[[Mapping[str, Tensor], float, str], dict[str, Tensor]]:
    def topk(flat: Tensor, k: int) -> Tensor:
        mask = torch.zeros(len(flat), dtype=torch.bool)
        mask[flat.topk(k).indices] = True
        return mask

    def wrong_masks(fisher: Mapping[str, Tensor], fraction: float, head: str) -> dict[str, Tensor]:
        everything = sum(value.numel() for value in fisher.values())
        inside = {} if competes else {n: v for n, v in fisher.items() if is_head(n, head)}
        size = sum(value.numel() for value in inside.values())
        body = {n: v for n, v in fisher.items() if n not in inside}
        masks: dict[str, Tensor] = {}
        for group in [body] if together else [{n: v} for n, v in body.items()]:
            flat = torch.cat([value.flatten() for value in group.values()])
            k = count(fraction, everything, size) if together else int(fraction * len(flat))
            parts = (choose or topk)(flat, k).split([value.numel() for value in group.values()])
            masks |= {n: part.view(group[n].shape) for n, part in zip(group, parts, strict=True)}
        if head_mask is not None:
            masks |= {n: torch.full(v.shape, head_mask) for n, v in inside.items()}
        return {name: masks[name] for name in fisher if name in masks}

    return wrong_masks


def _at_least(flat: Tensor, k: int) -> Tensor:
    return flat >= flat.sort(descending=True).values[k - 1]


def _more_than(flat: Tensor, k: int) -> Tensor:
    return flat > flat.sort(descending=True).values[k - 1]


def _smallest(flat: Tensor, k: int) -> Tensor:
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.argsort()[:k]] = True
    return mask


MASKS_MISTAKES = {
    "the head isn't counted: k = ⌊fraction · N⌋ − |head|": _masks(count=lambda f, n, head: int(f * n)),
    "the fraction is of all N entries, the head's too": _masks(
        count=lambda f, n, head: int(f * (n - head)) - head
    ),
    "the head takes part in the choice; it is always on, and only the others compete": _masks(competes=True),
    "the head's mask must be true everywhere: a new head has to train": _masks(head_mask=False),
    "the head has no mask in the result": _masks(head_mask=None),
    "each tensor has its own limit here; rank all entries together": _masks(together=False),
    "these are the smallest": _masks(choose=_smallest),
    "k rounds down, ⌊fraction · N⌋; this rounds up": _masks(
        count=lambda f, n, head: -int(-f * n // 1) - head
    ),
    "the head's name is looked for as text: score_norm and body.score aren't the head": _masks(
        is_head=lambda name, head: head in name
    ),
    "`> limit` leaves out the k-th entry itself": _masks(choose=_more_than),
    TIES: _masks(choose=_at_least),
    "fraction is a share, not percent": _masks(count=lambda f, n, head: max(int(f * n / 100), 0)),
}
