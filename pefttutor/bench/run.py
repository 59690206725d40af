"""Measure one row: compare results, then time, then bytes, then judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import isfinite

import torch

from pefttutor.bench.memory import kept_bytes, peak_bytes, resident_growth, state_bytes
from pefttutor.bench.protocol import Ratio, difference, disturbed_rounds, paired_ratio, time_rounds
from pefttutor.bench.row import Row, Step

__all__ = ["Result", "judge", "run"]


@dataclass(kw_only=True)
class Result:
    """What one row gave. Ratios are ours / peer (bound_time: bound / peer); bytes are given for each side."""

    name: str
    work: str
    peer: str
    bound: str | None
    goals: dict[str, float]
    tolerance: float
    device: str = "cpu"
    threads: int | None = None
    difference: float | None = None
    differs_in: str = ""
    rounds: int = 0
    disturbed: int = 0
    time: Ratio | None = None
    bound_time: Ratio | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    bytes: dict[str, dict[str, int]] = field(default_factory=dict)  # kind → side → bytes
    verdict: str = ""

    def ratio(self, kind: str) -> float | None:
        """The ratio that a goal of this kind is about; None where it wasn't measured."""
        if kind == "time":
            return None if self.time is None else self.time.median
        sides = self.bytes.get(kind)
        return sides["ours"] / sides["peer"] if sides and sides["peer"] else None


def run(row: Row, *, rounds: int | None = None, seed: int = 0, device: str = "cpu") -> Result:
    """Measure a row by the protocol. A missing peer or differing results give a verdict and no figures.

    >>> row = Row(name="toy", work="ones", peer="the same", build=lambda *_: lambda: {"y": torch.ones(1)})
    >>> result = run(row, rounds=3)
    >>> result.difference, len(result.seconds["peer"]), result.verdict
    (0.0, 3, 'no goal')
    """
    result = Result(
        name=row.name,
        work=row.work,
        peer=row.peer,
        bound=row.bound,
        goals=row.goals_on(device),
        tolerance=row.tolerance,
        device=device,
        threads=row.threads,
    )
    with _threads(row.threads):
        try:
            steps: dict[str, Step] = {side: row.build(side, seed, device) for side in row.sides}
        except ImportError as missing:
            hint = "; install the extra `bench`" if isinstance(missing, ModuleNotFoundError) else ""
            result.verdict = f"not measured: {missing}{hint}"
            return result
        result.difference, result.differs_in = difference(steps["ours"](), steps["peer"]())
        if result.difference <= row.tolerance:
            _measure(result, steps, row.rounds if rounds is None else rounds)
    if result.seconds and "resident" in result.goals:
        steps.clear()
        result.bytes["resident"] = {side: resident_growth(row.name, side, seed) for side in ("ours", "peer")}
    result.verdict = judge(result)
    return result


def _measure(result: Result, steps: dict[str, Step], rounds: int) -> None:
    """Time, then the bytes that the goals are about."""
    result.rounds = rounds
    wait = torch.cuda.synchronize if result.device == "cuda" else lambda: None
    result.seconds = time_rounds(steps, rounds, wait=wait)
    result.disturbed = disturbed_rounds(result.seconds)
    result.time = paired_ratio(result.seconds["ours"], result.seconds["peer"])
    if "bound" in steps:
        result.bound_time = paired_ratio(result.seconds["bound"], result.seconds["peer"])
    measures: dict[str, Callable[[Step], int]] = {
        "transient": partial(peak_bytes, device=result.device),
        "kept": kept_bytes,
        "state": state_bytes,
    }
    for kind, measure in measures.items():
        if kind in result.goals:
            result.bytes[kind] = {side: measure(steps[side]) for side in ("ours", "peer")}


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """torch has so many threads within the block."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def judge(result: Result) -> str:
    """One line: not a measurement, goals met, or which goals are missed and by how much.

    >>> toy = {"name": "toy", "work": "ones", "peer": "numpy", "bound": None, "tolerance": 1e-4, "difference": 0.0}
    >>> judge(Result(**toy, goals={"time": 1.0}, time=Ratio(median=1.5, low=1.4, high=1.6)))
    'missed: time 1.500 > 1'
    """
    worst = result.difference
    if worst is None or not isfinite(worst) or worst > result.tolerance:
        shown = "none" if worst is None else f"{worst:.1e}"
        return (
            f"not a measurement: results differ by {shown} ({result.differs_in}), "
            f"allowed are {result.tolerance:.0e}"
        )
    missed = []
    for kind, goal in result.goals.items():
        reached = result.ratio(kind)
        if reached is None:
            missed.append(f"{kind} not measured")
        elif reached > goal:
            missed.append(f"{kind} {reached:.3f} > {goal:g}")
    if missed:
        return "missed: " + ", ".join(missed)
    return "met" if result.goals else "no goal"
