"""One row of the table: what is measured, against whom, and what it must reach."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

__all__ = ["GOALS", "Row", "Side", "Step", "discover"]

Side = Literal["ours", "peer", "bound"]
Step = Callable[[], dict[str, Tensor]]  # one forward and backward; returns outputs and gradients by name
GOALS = ("time", "transient", "kept", "state", "resident")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A piece of work that two or three sides do.

    `build(side, seed, device)` returns that side's step: a function without arguments that does the work once on the
    device ("cpu" or "cuda") and returns its outputs and gradients. It must draw the same weights and inputs for every
    side, on the CPU, whose draws are everywhere the same. The bound (a floor under the time, such as the frozen model
    alone) may return nothing: its results aren't compared. A peer that this torch lacks raises ImportError.
    `goals` maps "time", "transient", "kept", "state" or "resident" to the largest ratio ours / peer that meets
    the goal; bytes are measured only where there is a goal for them. For "state" a step has the `optimizer` that
    it steps as an attribute. `cuda_goals` are those on a GPU, where "resident" isn't measured.

    >>> row = Row(name="toy", work="ones", peer="numpy", build=print, goals={"time": 0.9}, bound="nothing at all")
    >>> row.goals_on("cpu"), row.goals_on("cuda"), row.sides
    ({'time': 0.9}, {}, ('ours', 'peer', 'bound'))

    Raises: ValueError for a goal of an unknown name.
    """

    name: str
    work: str
    peer: str
    build: Callable[[Side, int, str], Step]
    goals: dict[str, float] = field(default_factory=dict)
    cuda_goals: dict[str, float] = field(default_factory=dict)
    threads: int | None = None  # of the CPU, for torch; None leaves them as they are
    bound: str | None = None  # what the bound is, in words; None when there is none
    tolerance: float = 1e-4  # largest relative difference under which the two sides did the same work
    rounds: int = 15

    def __post_init__(self) -> None:
        unknown = sorted((set(self.goals) | set(self.cuda_goals)) - set(GOALS))
        if unknown:
            raise ValueError(
                f"row {self.name!r}: goals {unknown} are unknown; expected some of {list(GOALS)}"
            )

    def goals_on(self, device: str) -> dict[str, float]:
        """The goals that hold on the device."""
        return dict(self.cuda_goals if device == "cuda" else self.goals)

    @property
    def sides(self) -> tuple[Side, ...]:
        return ("ours", "peer", "bound") if self.bound else ("ours", "peer")


def discover() -> dict[str, Row]:
    """Every row of every file in `pefttutor/bench/rows/`, by name.

    >>> "lora_step" in discover()
    True

    Raises: ValueError when two files define the same name.
    """
    from pefttutor.bench import rows

    found: dict[str, Row] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(rows.__path__)):
        for row in importlib.import_module(f"{rows.__name__}.{module}").ROWS:
            if row.name in found:
                raise ValueError(f"two rows are called {row.name!r}; the second is in rows/{module}.py")
            found[row.name] = row
    return found
