"""Notebook 16, LoRAHub: what the search makes small, and the search: right answers and wrong ones, with names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

# ---- 16.3: what the search makes small


def objective(batch_means: Tensor, sizes: Tensor, w: Tensor, l1: float) -> Tensor:
    """The mean loss over all examples, and l1 · mean |w|."""
    return (batch_means * sizes).sum() / sizes.sum() + l1 * w.abs().mean()


def _objective(
    loss: Callable[[Tensor, Tensor], Tensor] = lambda means, sizes: (means * sizes).sum() / sizes.sum(),
    penalty: Callable[[Tensor], Tensor] = lambda w: w.abs().mean(),
    sign: float = 1.0,
) -> Callable[..., Tensor]:
    def wrong_objective(batch_means: Tensor, sizes: Tensor, w: Tensor, l1: float) -> Tensor:
        return loss(batch_means, sizes) + sign * l1 * penalty(w)

    return wrong_objective


OBJECTIVE_MISTAKES: dict[str, Callable[..., Any]] = {
    "the batches' means are summed and divided by the number of examples, as in the released code: a mean is divided "
    "again": _objective(loss=lambda means, sizes: means.sum() / sizes.sum()),
    "every batch counts alike: a smaller one has fewer examples, so weight each mean by its size": _objective(
        loss=lambda means, sizes: means.mean()
    ),
    "the losses are summed over the examples: take their mean": _objective(
        loss=lambda means, sizes: (means * sizes).sum()
    ),
    "the batches' means are summed": _objective(loss=lambda means, sizes: means.sum()),
    "the sum over the examples is divided by the number of batches": _objective(
        loss=lambda means, sizes: (means * sizes).sum() / len(sizes)
    ),
    "|w| is summed over the plug-ins: take its mean": _objective(penalty=lambda w: w.abs().sum()),
    "w is squared: the penalty is of |w|": _objective(penalty=lambda w: w.square().mean()),
    "the weights keep their signs, and those of two signs cancel out: take |w|": _objective(
        penalty=lambda w: w.mean()
    ),
    "this is |Σ w|: take |w| of each plug-in first": _objective(penalty=lambda w: w.sum().abs()),
    "this is the length of w: take the mean of |w|": _objective(penalty=lambda w: w.norm()),
    "the penalty is missing": lambda batch_means, sizes, w, l1: (batch_means * sizes).sum() / sizes.sum(),
    "the penalty is subtracted, so that large weights are rewarded": _objective(sign=-1.0),
    "l1 is missing": lambda batch_means, sizes, w, l1: objective(batch_means, sizes, w, 1.0),
    "the penalty is divided by the number of examples, too": _objective(
        penalty=lambda w: w.abs().mean() / 7  # the check's three batches hold seven
    ),
}

# ---- 16.4: a search without gradients

Cost = Callable[[Tensor], float]


def search(cost: Cost, n: int, tries: int, bound: float, step: float, generator: Generator) -> Tensor:
    """The best of `tries` weights: the first is 0, each of the others a step away from the best so far."""
    best = torch.zeros(n)
    least = cost(best)
    for _ in range(tries - 1):
        candidate = (best + step * torch.randn(n, generator=generator)).clamp(-bound, bound)
        if (now := cost(candidate)) < least:
            best, least = candidate, now
    return best


def _search(
    *,
    around: str = "best",
    returns: str = "best",
    clamp: bool = True,
    better: Callable[[float, float], bool] = lambda now, least: now < least,
    first: bool = True,
    more: int = 0,
    noise: Callable[[int, Generator], Tensor] = lambda n, generator: torch.randn(n, generator=generator),
    remember: bool = True,
) -> Callable[..., Tensor]:
    """around: what a step starts from, "best", "last" or "zero". first: whether 0 is tried. more: tries too many."""

    def wrong_search(
        cost: Cost, n: int, tries: int, bound: float, step: float, generator: Generator
    ) -> Tensor:
        best = last = torch.zeros(n)
        least = cost(best) if first else float("inf")
        for _ in range(tries - first + more):
            start = {"best": best, "last": last, "zero": torch.zeros(n)}[around]
            last = start + step * noise(n, generator)
            last = last.clamp(-bound, bound) if clamp else last
            now = cost(last)
            if better(now, least):
                best, least = last, now if remember else least
        return best if returns == "best" else last

    return wrong_search


SEARCH_MISTAKES: dict[str, Callable[..., Any]] = {
    "weights leave ±bound: clamp each candidate": _search(clamp=False),
    "the last candidate is returned: return the best": _search(returns="last"),
    "a step starts from the last candidate, so that this is a random walk: start from the best": _search(
        around="last"
    ),
    "every step starts from 0: start from the best so far": _search(around="zero"),
    "the worse one is kept: small costs are good": _search(better=lambda now, least: now > least),
    "every candidate is kept: keep one only if it costs less than the best": _search(
        better=lambda now, least: True
    ),
    "the least cost isn't remembered, so that whatever beats the start is kept": _search(remember=False),
    "the start costs a try, too: this asks once more than allowed": _search(more=1),
    "this asks once less than allowed": _search(more=-1),
    "0 is never tried: it is the first of the tries": _search(first=False),
    "the step is uniform: draw it by torch.randn": _search(
        noise=lambda n, generator: 2 * torch.rand(n, generator=generator) - 1
    ),
    "all weights take the same step: draw n numbers": _search(
        noise=lambda n, generator: torch.randn(1, generator=generator).expand(n)
    ),
    "the generator isn't used: torch.randn(n, generator=generator)": _search(
        noise=lambda n, generator: torch.zeros(n)
    ),
}
