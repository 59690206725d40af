"""The protocol: interleave, rotate, take the median of the paired ratios, count the disturbed rounds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

__all__ = ["DISTURBED", "Ratio", "difference", "disturbed_rounds", "paired_ratio", "time_rounds"]

DISTURBED = 1.25  # a round counts as disturbed when a side took over this many times its own median


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of the rounds' ratios."""

    median: float
    low: float
    high: float


def time_rounds(
    steps: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every step in every round; round i starts with step i, modulo their number.

    >>> order: list[str] = []
    >>> steps = {side: lambda side=side: order.append(side) for side in ("ours", "peer")}
    >>> time_rounds(steps, rounds=2, warmup=0, clock=iter(range(8)).__next__)
    {'ours': [1, 1], 'peer': [1, 1]}
    >>> order
    ['ours', 'peer', 'peer', 'ours']

    The results of a step are dropped after the clock has stopped, so that freeing them costs nobody any time.

    wait: returns once all is done that was ordered. A GPU's orders come back before it has done them: the clock
        starts after what went before, and stops after the step's own.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, expected at least 1")
    names = list(steps)
    for _ in range(warmup):
        for name in names:
            steps[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection in the middle would be charged to whoever runs then
    try:
        for i in range(rounds):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                wait()
                start = clock()
                result = steps[name]()
                wait()
                seconds[name].append(clock() - start)
                del result
    finally:
        if collecting:
            gc.enable()
    return seconds


def paired_ratio(numerator: list[float], denominator: list[float]) -> Ratio:
    """Median and quartiles of numerator[i] / denominator[i], both of one round: they met the same machine.

    >>> paired_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0])                # what slows a round down slows both
    Ratio(median=2.0, low=2.0, high=2.0)
    """
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    return Ratio(median(ratios), low, high)


def disturbed_rounds(seconds: Mapping[str, list[float]]) -> int:
    """How many rounds had a side that took over `DISTURBED` times its own median.

    >>> disturbed_rounds({"ours": [1.0, 1.0, 1.2], "peer": [1.0, 1.5, 1.0]})
    1
    """
    limits = {name: DISTURBED * median(times) for name, times in seconds.items()}
    rounds = zip(*seconds.values(), strict=True)
    return sum(any(t > limit for t, limit in zip(times, limits.values(), strict=True)) for times in rounds)


def difference(ours: Mapping[str, Tensor], peer: Mapping[str, Tensor]) -> tuple[float, str]:
    """Largest relative difference max|a − b| / max|b| of all tensors, and the name of the one that has it.

    Infinite, with the reason in place of the name, where names or shapes differ or a value isn't finite.

    >>> difference({"y": torch.tensor([1.0, 2.0])}, {"y": torch.tensor([1.0, 4.0])})        # 2 of 4
    (0.5, 'y')
    """
    if set(ours) != set(peer) or not ours:
        return float("inf"), f"names differ: {sorted(set(ours) ^ set(peer)) or 'no results at all'}"
    worst, where = 0.0, min(ours)
    for name, a in ours.items():
        b = peer[name]
        if a.shape != b.shape:
            return float("inf"), f"{name}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
        a, b = a.detach().double(), b.detach().double()
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            return float("inf"), f"{name}: a value is not finite"
        largest = b.abs().max().item() if b.numel() else 0.0
        delta = (a - b).abs().max().item() if b.numel() else 0.0
        relative = delta / largest if largest else (float("inf") if delta else 0.0)
        if relative > worst:
            worst, where = relative, name
    return worst, where
