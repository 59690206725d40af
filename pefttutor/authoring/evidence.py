"""What two ways' runs say about each other: paired differences, their error, and how many seeds a claim needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, mean, stdev
from typing import Any

__all__ = ["Difference", "paired", "seeds_needed"]


@dataclass(frozen=True)
class Difference:
    """The mean of the differences over seeds, its standard error, and for how many of n seeds it has its sign."""

    mean: float
    error: float
    agree: int
    n: int

    @property
    def deviation(self) -> float:
        """The standard deviation of one seed's difference: what `seeds_needed` asks for."""
        return self.error * math.sqrt(self.n)

    def __str__(self) -> str:
        return f"{100 * self.mean:+.1f} ± {100 * self.error:.1f} points, {self.agree} of {self.n} seeds"


def paired(
    one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], column: str = "test"
) -> Difference:
    """How much better `one` is than `other`, seed by seed.

        d_s = one_s − other_s,    mean d̄,    standard error s_d / √n,    s_d² = Σ (d_s − d̄)² / (n − 1)

    Both ways of a seed see the same examples in the same order, so that what a seed does to both cancels out.

    >>> one, other = (0.9, 0.8, 0.7), (0.8, 0.6, 0.6)
    >>> print(paired(*([{"seed": s, "test": scores[s]} for s in range(3)] for scores in (one, other))))
    +13.3 ± 3.3 points, 3 of 3 seeds

    one, other: rows of a table, as `tables.best` gives them, in any order. column: what is compared, a share.

    Raises: ValueError unless both have the same seeds, each once, and at least two.
    Source: the paired t statistic is mean / error (Student 1908).
    """
    scores = [{row["seed"]: row[column] for row in rows} for rows in (one, other)]
    seeds = sorted(scores[0])
    if len(seeds) != len(one) or len(scores[1]) != len(other) or sorted(scores[1]) != seeds or len(seeds) < 2:
        raise ValueError(
            f"the seeds are {sorted(row['seed'] for row in one)} and {sorted(row['seed'] for row in other)}; expected "
            "the same ones, each once, and at least two"
        )
    found = [scores[0][seed] - scores[1][seed] for seed in seeds]
    middle = mean(found)
    agree = sum(math.copysign(1, d) == math.copysign(1, middle) for d in found if d and middle)
    return Difference(middle, stdev(found) / math.sqrt(len(found)), agree, len(found))


def seeds_needed(difference: float, deviation: float, *, error: float = 0.05, miss: float = 0.2) -> int:
    """How many seeds show a difference of this size, if it is there.

        n ≥ ((z_{1 − error/2} + z_{1 − miss}) · deviation / difference)²

    >>> seeds_needed(0.02, 0.03), seeds_needed(0.04, 0.03)
    (18, 5)

    difference: what is to be seen. deviation: of one seed's difference (`Difference.deviation`), from other seeds than
    those of the test. error: how often nothing may pass for a difference. miss: how often this one may be missed.

    Raises: ValueError for a difference or a deviation that isn't above zero.
    """
    if not (difference > 0 and deviation > 0):
        raise ValueError(f"difference={difference} and deviation={deviation}; expected both above 0")
    normal = NormalDist()
    z = normal.inv_cdf(1 - error / 2) + normal.inv_cdf(1 - miss)
    return max(2, math.ceil((z * deviation / difference) ** 2))
