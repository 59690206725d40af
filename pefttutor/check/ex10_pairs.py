"""Notebook 10, seeds in pairs: the right answer, and those that learners write instead, each with its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def paired(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """The mean of the seeds' differences, one − other, and its standard error s / √n, with n − 1 in s."""
    gaps = _gaps(one, other)
    return _mean(gaps), (_variance(gaps) / len(gaps)) ** 0.5


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _variance(values: Sequence[float], less: int = 1) -> float:
    return sum((value - _mean(values)) ** 2 for value in values) / (len(values) - less)


def _gaps(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


Pairing = Callable[[Sequence[float], Sequence[float]], Any]


def _with_error(error: Callable[[list[float]], float]) -> Pairing:
    return lambda one, other: (_mean(_gaps(one, other)), error(_gaps(one, other)))


PAIRED_MISTAKES: dict[str, Pairing] = {
    "the pairs are lost: this error treats the two as independent runs": lambda one, other: (
        _mean(one) - _mean(other),
        ((_variance(one) + _variance(other)) / len(one)) ** 0.5,
    ),
    "this is the spread of the differences; the mean's error is smaller by √n": _with_error(
        lambda gaps: _variance(gaps) ** 0.5
    ),
    "divided by n in place of √n": _with_error(lambda gaps: _variance(gaps) ** 0.5 / len(gaps)),
    "the variance is divided by n; with n − 1 it isn't too small": _with_error(
        lambda gaps: (_variance(gaps, less=0) / len(gaps)) ** 0.5
    ),
    "this is the variance of the mean; take its root": _with_error(lambda gaps: _variance(gaps) / len(gaps)),
    "the difference is one − other": lambda one, other: paired(other, one),
    "the absolute differences are averaged: wins and losses must cancel": lambda one, other: (
        _mean([abs(gap) for gap in _gaps(one, other)]),
        paired(one, other)[1],
    ),
    "sorting loses which runs share a seed": lambda one, other: paired(sorted(one), sorted(other)),
    "differences are summed, not averaged": lambda one, other: (
        sum(_gaps(one, other)),
        paired(one, other)[1],
    ),
    "this is the spread of the first method's runs, not of the differences": lambda one, other: (
        paired(one, other)[0],
        (_variance(one) / len(one)) ** 0.5,
    ),
    "the error of the mean is missing": lambda one, other: paired(one, other)[0],
    "the median is something else than the mean": lambda one, other: (
        sorted(_gaps(one, other))[len(one) // 2],
        paired(one, other)[1],
    ),
    "this is 1.96 errors, half of a confidence interval; one error is asked for": lambda one, other: (
        paired(one, other)[0],
        1.96 * paired(one, other)[1],
    ),
}
