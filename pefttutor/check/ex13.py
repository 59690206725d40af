"""Notebook 13 and its appendix: a merge and restart, MoRA's and MELoRA's changes, and moments that are cut."""

from __future__ import annotations

from typing import Any

from pefttutor.check.compare import same_result
from pefttutor.check.core import exercise
from pefttutor.check.ex13_answers import (
    CUT_MISTAKES,
    MELORA_MISTAKES,
    MORA_MISTAKES,
    RESTART_MISTAKES,
    cut_moment,
    melora_branch,
    mora_branch,
    restarted,
)
from pefttutor.check.values import draw


@exercise("13.1", reference=restarted)
def ex13_1(attempt: Any) -> None:
    """A layer that isn't square, ranks 2 and 1, and an A drawn anew that differs from the old one."""
    for r, s in ((2, 1.5), (1, 4.0)):
        inputs = {
            "weight": draw(5, 7, seed=1),
            "lora_A": draw(r, 7, seed=2),
            "lora_B": draw(5, r, seed=3),
            "s": s,
            "new_A": draw(r, 7, seed=4),
        }
        same_result(attempt, restarted, inputs, mistakes=RESTART_MISTAKES)


@exercise("13.2", reference=mora_branch)
def ex13_2(attempt: Any) -> None:
    """Values and gradients, where neither side is a multiple of r̂, for a batch and for one vector."""
    for leading, n_in, n_out, width in (((2, 3), 11, 7, 4), ((), 8, 7, 3)):
        inputs = {"x": draw(*leading, n_in, seed=6), "M": draw(width, width, seed=7), "n_out": n_out}
        same_result(attempt, mora_branch, inputs, gradients=("x", "M"), mistakes=MORA_MISTAKES)


@exercise("13.3", reference=melora_branch)
def ex13_3(attempt: Any) -> None:
    """Values and gradients of three blocks that aren't square, for a batch and for one vector."""
    for leading, r in (((2, 4), 2), ((), 1)):
        inputs = {
            "x": draw(*leading, 12, seed=8),
            "A": draw(3, r, 4, seed=9),
            "B": draw(3, 2, r, seed=10),
            "s": 2.5,
        }
        same_result(attempt, melora_branch, inputs, gradients=("x", "A", "B"), mistakes=MELORA_MISTAKES)


@exercise("13.4", reference=cut_moment)
def ex13_4(attempt: Any) -> None:
    """Moments of both signs, a share of half, of most, of all, and of nothing."""
    for shape, share in (((4, 5), 0.3), ((20,), 0.9), ((2, 3), 1.0), ((2, 3), 0.0)):
        inputs = {"moment": draw(*shape, seed=5), "share": share}
        same_result(attempt, cut_moment, inputs, mistakes=CUT_MISTAKES)
