"""Paired differences, against scipy's t test and its power."""

import math
import random

import pytest

from pefttutor.authoring.evidence import paired, seeds_needed


def rows(seed, n=10, shift=0.0):
    generator = random.Random(seed)
    found = [{"seed": s, "test": generator.gauss(0.8 + shift, 0.05), "other": s / 10} for s in range(n)]
    generator.shuffle(found)
    return found


def test_it_is_the_paired_t_test():
    stats = pytest.importorskip("scipy.stats")
    one, other = rows(1, shift=0.03), rows(2)
    found = paired(one, other)
    columns = [[row["test"] for row in sorted(way, key=lambda row: row["seed"])] for way in (one, other)]
    assert found.mean / found.error == pytest.approx(stats.ttest_rel(*columns).statistic)
    differences = [a - b for a, b in zip(*columns, strict=True)]
    assert found.agree == sum((d > 0) == (found.mean > 0) for d in differences)
    assert (found.n, found.deviation) == (10, pytest.approx(found.error * math.sqrt(10)))
    assert paired(other, one).mean == -found.mean
    assert paired(one, other, column="other").mean == 0


@pytest.mark.parametrize(
    ("one", "other"), [(rows(1), rows(2)[1:]), (rows(1) * 2, rows(2)), (rows(1, n=1), rows(2, n=1))]
)
def test_what_cannot_be_paired_is_refused(one, other):
    with pytest.raises(ValueError, match=r"expected the same ones, each once, and at least two"):
        paired(one, other)


@pytest.mark.parametrize(("difference", "deviation"), [(0.02, 0.03), (0.01, 0.05)])
def test_so_many_seeds_show_the_difference_four_times_in_five(difference, deviation):
    norm = pytest.importorskip("scipy.stats").norm
    n = seeds_needed(difference, deviation)

    def power(n):
        return norm.sf(norm.isf(0.025) - difference * math.sqrt(n) / deviation)

    assert power(n - 1) < 0.8 <= power(n)


@pytest.mark.parametrize(("difference", "deviation"), [(0.0, 0.1), (0.1, 0.0), (-0.1, 0.1)])
def test_no_difference_needs_no_number(difference, deviation):
    with pytest.raises(ValueError, match=r"expected both above 0"):
        seeds_needed(difference, deviation)
