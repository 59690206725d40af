"""Where the ranks went while a method trained: `moving_ranks.figure` at a glance, `moving_ranks` step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import ipywidgets
import numpy
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pefttutor.widgets.explorer import Explorer
from pefttutor.widgets.names import place
from pefttutor.widgets.rank_figures import draw_grid
from pefttutor.widgets.style import GREY, OKABE_ITO, Picture, paper

__all__ = ["RankRecord", "moving_ranks"]

_ALT = "Ranks while a method trains: of every layer at one step, one layer's over all steps, and of all together."
Ranks = Mapping[str, int]


class RankRecord:
    """A hook for `fit` that has a method do its work and notes its ranks after every step.

        record = widgets.RankRecord(method)
        pefttutor.fit(model, …, method=record)
        widgets.moving_ranks(record.steps)

    method: attached to the model that is trained; anything with `ranks(model)` → {layer name: rank}.
    steps: the ranks after each step, as a list.

    Raises: TypeError for a method without ranks.
    """

    def __init__(self, method: Any) -> None:
        if not hasattr(method, "ranks"):
            raise TypeError(
                f"{type(method).__name__} has no ranks(model) → {{layer name: rank}}, so there is nothing to note"
            )
        self.method = method
        self.steps: list[dict[str, int]] = []

    def __getattr__(self, name: str) -> Any:
        """All that isn't said here is the method's to say, such as `penalty`."""
        if name == "method":  # of an object that is being copied
            raise AttributeError(name)
        return getattr(self.method, name)

    def after_step(self, model: Any, step: int) -> None:
        if hasattr(self.method, "after_step"):
            self.method.after_step(model, step)
        self.steps.append(dict(self.method.ranks(model)))


class _MovingRanks:
    """`moving_ranks.figure(steps)` is the static picture of a training, `moving_ranks(steps)` has a slider over time.

    >>> moving_ranks.figure([{"q_proj": 4, "v_proj": 4}, {"q_proj": 1, "v_proj": 3}, {"q_proj": 2, "v_proj": 2}]).alt
    'Ranks of 2 layers over 3 steps: together from 8 to 4, in the end from 2 to 2. 1 time a layer got rank.'
    """

    def figure(self, steps: Sequence[Ranks]) -> Picture:
        """Every layer's rank in the end, and over all steps. Argument and errors are those of `moving_ranks`."""
        grid = _table(steps)
        got = int((numpy.diff(grid, axis=0) > 0).sum())
        alt = (
            f"Ranks of {grid.shape[1]} layers over {len(grid)} steps: together from {grid[0].sum()} to {grid[-1].sum()}"
            f", in the end from {grid[-1].min()} to {grid[-1].max()}. "
            f"{got} {'time' if got == 1 else 'times'} a layer got rank."
        )
        with paper():
            return _draw(steps, grid, len(grid) - 1, None, alt)

    def __call__(self, steps: Sequence[Ranks], *, step: int = 0) -> Explorer:
        """Go through a training: the rank of every layer at a step, and one layer's way.

            widgets.moving_ranks(record.steps)

        steps: {layer name: rank} after each step, from 0 on, as a `RankRecord` has noted them.
        step: where the slider starts.

        Raises: ValueError for no steps, steps that name other layers than the first, a rank that is no whole number
            from 0 on, or a step that isn't there.
        """
        grid = _table(steps)
        if not 0 <= step < len(grid):
            raise ValueError(f"step={step}: expected a step from 0 to {len(grid) - 1}")

        def draw(step: int, layer: str) -> Picture:
            before = grid[max(step - 1, 0)]
            rank, change = steps[step][layer], grid[step] - before
            alt = (
                f"After step {step} all layers have {grid[step].sum()} ranks together, {layer} has {rank}. "
                f"In this step {(change < 0).sum()} layers lost rank and {(change > 0).sum()} got some."
            )
            return _draw(steps, grid, step, layer, alt)

        slider = ipywidgets.IntSlider(value=step, min=0, max=len(grid) - 1, continuous_update=False)
        return Explorer(draw, _ALT, step=slider, layer=list(steps[0]))


def _table(steps: Sequence[Ranks]) -> numpy.ndarray:
    """Ranks as numbers. Shapes: → (steps, layers)."""
    if not steps or not steps[0]:
        raise ValueError(
            "there are no ranks to show: expected {layer name: rank} after each step, one at least"
        )
    names = list(steps[0])
    for i, ranks in enumerate(steps):
        if list(ranks) != names:
            raise ValueError(f"step {i} has ranks of {list(ranks)}; expected those of step 0: {names}")
        for name, rank in ranks.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
                raise ValueError(
                    f"step {i}: the rank of {name} is {rank!r}; expected a whole number, 0 or more"
                )
    return numpy.array([list(ranks.values()) for ranks in steps])


def _draw(steps: Sequence[Ranks], grid: numpy.ndarray, step: int, layer: str | None, alt: str) -> Picture:
    """On the left the ranks after a step by layer and module, on the right those of all steps."""
    places = place(steps[0])
    rows = list(dict.fromkeys(row for row, _ in places.values()))
    columns = list(dict.fromkeys(column for _, column in places.values()))
    cells = numpy.full((len(rows), len(columns)), numpy.nan)
    for name, (row, column) in places.items():
        cells[rows.index(row), columns.index(column)] = steps[step][name]
    picture = Picture(9.6, min(max(3.6, 1.4 + 0.34 * len(rows)), 12), alt=alt)
    share = min(max(0.7, 0.2 * len(columns)), 1.6)
    left, right = picture.subplots(1, 2, width_ratios=[share, 1.4])
    draw_grid(left, cells, rows, columns, max(int(grid.max()), 1), decimals=0)
    left.set_title(f"Ranks after step {step}: {grid[step].sum()} in all")
    _draw_ways(right, list(steps[0]), grid, step, layer)
    return picture


def _draw_ways(axes: Axes, names: Sequence[str], grid: numpy.ndarray, step: int, layer: str | None) -> None:
    """A line a layer; without a chosen one, each has the colour of its module."""
    places, colours = place(names), list(OKABE_ITO.values())
    modules = list(dict.fromkeys(column for _, column in places.values()))
    for i, name in enumerate(names):
        module = places[name][1]
        colour = colours[modules.index(module) % len(colours)] if layer is None else "#C9C9C9"
        axes.step(
            range(len(grid)), grid[:, i], where="post", color=colour, linewidth=1.1, alpha=0.8, label=module
        )
    if layer is None:
        by_module = {str(line.get_label()): line for line in axes.lines}
        axes.legend(by_module.values(), by_module.keys(), fontsize=8)
    else:
        way = grid[:, names.index(layer)]
        axes.step(range(len(grid)), way, where="post", color=OKABE_ITO["blue"], linewidth=2)
        came = [i + 1 for i, (before, after) in enumerate(pairwise(way)) if after > before]
        axes.plot(came, way[came], "^", color=OKABE_ITO["green"], markersize=7, label="got rank")
        axes.plot([step], [way[step]], "o", color=OKABE_ITO["vermillion"], markersize=9)
        axes.axvline(step, color=GREY, linewidth=1, linestyle=":")
        if came:
            axes.legend(handles=[axes.lines[-3]], fontsize=8)
    axes.set(
        xlabel="step", ylabel="rank", title="A line a layer" if layer is None else f"{layer}, the others grey"
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


moving_ranks = _MovingRanks()
