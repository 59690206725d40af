"""Notebook 22, sweeps: the right answers, and those that learners write instead, each with its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from math import comb
from statistics import fmean, median
from typing import Any

Rows = Sequence[Mapping[str, Any]]

# ---- the reference solutions


def tuned(rows: Rows, search_seeds: Sequence[int]) -> tuple[float, bool]:
    """The rate with the best mean validation over the search seeds, and whether it is the first or the last of them.

    A rate counts if every search seed has tried it; of equal ones the smaller is taken.
    """
    return _tuned(rows, search_seeds)


def expected_best(scores: Sequence[float], k: int) -> float:
    """The mean, over all sets of k of the n tries, of the set's best score.

    Σ_{i = k}^{n} C(i − 1, k − 1) / C(n, k) · v_(i), with the scores v_(1) ≤ … ≤ v_(n)
    """
    n = len(scores)
    return sum(comb(i, k - 1) * v for i, v in enumerate(sorted(scores))) / comb(n, k)


# ---- what learners write instead


def _tuned(
    rows: Rows,
    search_seeds: Sequence[int],
    *,
    column: str = "validation",
    mean: Callable[[Sequence[float]], float] = fmean,
    search_only: bool = True,
    tried_by_all: bool = True,
    choose: Callable[..., float] = max,
    largest_first: bool = False,
    edges: Callable[[list[float]], Sequence[float]] = lambda rates: (rates[0], rates[-1]),
) -> tuple[float, bool]:
    by_rate: dict[float, dict[int, float]] = {}
    for row in rows:
        if row["seed"] in search_seeds or not search_only:
            by_rate.setdefault(row["lr"], {})[row["seed"]] = row[column]
    found = {
        lr: mean(list(by_seed.values()))
        for lr, by_seed in sorted(by_rate.items(), reverse=largest_first)
        if not tried_by_all or set(search_seeds) <= set(by_seed)
    }
    best = choose(found, key=lambda lr: found[lr])
    return best, best in edges(sorted(found))


def _tuned_with(**change: Any) -> Callable[..., Any]:
    return lambda rows, search_seeds: _tuned(rows, search_seeds, **change)


TUNED_MISTAKES: dict[str, Callable[..., Any]] = {
    "the rate is chosen by the test split: then the test score says how well you chose, too": _tuned_with(
        column="test"
    ),
    "the test seeds' runs vote, too": _tuned_with(search_only=False),
    "one lucky run decides: average over the search seeds": _tuned_with(mean=max),
    "the worst run decides: average over the search seeds": _tuned_with(mean=min),
    "this is the median over the seeds, which forgets a run that fell apart": _tuned_with(mean=median),
    "this is the worst rate": _tuned_with(choose=min),
    "a rate counts that not every search seed has tried": _tuned_with(tried_by_all=False),
    "of equal rates the smaller is asked for": _tuned_with(largest_first=True),
    "only the lower edge is looked at: a better rate may lie above the last one, too": _tuned_with(
        edges=lambda rates: rates[:1]
    ),
    "only the upper edge is looked at: a better rate may lie below the first one, too": _tuned_with(
        edges=lambda rates: rates[-1:]
    ),
    "the two are turned around: True means that the best rate lies at an edge": _tuned_with(
        edges=lambda rates: rates[1:-1]
    ),
    "this is the mean score; return the rate": lambda rows, search_seeds: (
        max(
            fmean(r["validation"] for r in rows if r["lr"] == lr and r["seed"] in search_seeds)
            for lr in {r["lr"] for r in rows if r["seed"] in search_seeds}
        ),
        tuned(rows, search_seeds)[1],
    ),
    "whether it lies at an edge is missing": lambda rows, search_seeds: tuned(rows, search_seeds)[0],
}


def _best_with(weight: Callable[[int, int, int], float], *, reverse: bool = False) -> Callable[..., float]:
    """Σ of the weight of i, n and k, times the i-th smallest (in reverse largest) of the scores, i = 0, 1, …"""
    return lambda scores, k: sum(
        weight(i, len(scores), k) * v for i, v in enumerate(sorted(scores, reverse=reverse))
    )


BEST_MISTAKES: dict[str, Callable[..., Any]] = {
    "these tries are drawn with replacement; a rate that was tried isn't tried again": _best_with(
        lambda i, n, k: ((i + 1) / n) ** k - (i / n) ** k
    ),
    "this is the expected worst: the scores are in the wrong order": _best_with(
        lambda i, n, k: comb(i, k - 1) / comb(n, k), reverse=True
    ),
    "not divided by the number of sets": _best_with(lambda i, n, k: comb(i, k - 1)),
    "the k − 1 others come from all the other tries; they must be no better than the best": _best_with(
        lambda i, n, k: comb(n - 1, k - 1) / comb(n, k) / k
    ),
    "i counts from 0 here: below the i-th there are i scores, not i − 1": _best_with(
        lambda i, n, k: comb(max(i - 1, 0), k - 1) / comb(n, k)
    ),
    "k is left out: this is the best of all": lambda scores, k: max(scores),
    "only the first k tries are looked at; average over all sets of k": lambda scores, k: max(scores[:k]),
    "only neighbours are looked at; average over all sets of k": lambda scores, k: fmean(
        max(scores[i : i + k]) for i in range(len(scores) - k + 1)
    ),
    "this is the mean of the k best tries": lambda scores, k: fmean(sorted(scores)[-k:]),
    "this is the best of k tries in the middle case; the mean over all sets is asked for": (
        lambda scores, k: median(max(tries) for tries in combinations(scores, k))
    ),
    "equal scores count once here, but each is a try of its own": lambda scores, k: expected_best(
        list(dict.fromkeys(scores)), min(k, len(set(scores)))
    ),
}
