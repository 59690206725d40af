"""The two pictures of `pefttutor.widgets.ranks`: all layers at once, and one layer cut to k directions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pefttutor.widgets.names import place
from pefttutor.widgets.spectrum import Update, effective_rank, stable_rank
from pefttutor.widgets.style import DIVERGING, GREY, OKABE_ITO, SEQUENTIAL, Picture

MAX_SHOWN = 256  # rows and columns of a heat map; of a larger matrix every n-th is shown


def draw_overview(found: Mapping[str, Update]) -> Picture:
    """On the left the effective rank by layer and module, on the right the singular values of every layer.

    >>> import torch; from pefttutor.widgets.spectrum import decompose
    >>> draw_overview({"layers.0.q_proj": decompose(torch.eye(4))}).alt[:74]
    'Effective rank of ΔW in 1 layers, from 4.0 to 4.0 (median 4.0) of 4 direct'
    """
    erank = {name: effective_rank(update.sigma) for name, update in found.items()}
    places = place(found)
    rows = list(dict.fromkeys(row for row, _ in places.values()))
    columns = list(dict.fromkeys(column for _, column in places.values()))
    most = max(len(update.sigma) for update in found.values())
    low, high, middle = min(erank.values()), max(erank.values()), median(erank.values())
    alt = (
        f"Effective rank of ΔW in {len(found)} layers, from {low:.1f} to {high:.1f} (median {middle:.1f}) "
        f"of {most} directions, and the singular values of each."
    )
    picture = Picture(9.6, min(max(3.4, 1.4 + 0.34 * len(rows)), 12), alt=alt)
    share = min(max(0.8, 0.22 * len(columns)), 1.8)
    left, right = picture.subplots(1, 2, width_ratios=[share, 1])

    grid = numpy.full((len(rows), len(columns)), numpy.nan)
    for name, (row, column) in places.items():
        grid[rows.index(row), columns.index(column)] = erank[name]
    draw_grid(left, grid, rows, columns, most, decimals=1)
    left.set_title(f"Effective rank of ΔW (at most {most})")
    _draw_spectra(right, found, {name: column for name, (_, column) in places.items()})
    return picture


def draw_grid(
    axes: Axes, grid: numpy.ndarray, rows: Sequence[str], columns: Sequence[str], most: int, *, decimals: int
) -> None:
    """Numbers from 0 to `most` by layer and module, written into the cells where there is room; NaN: no such layer."""
    axes.set_facecolor("#EEEEEE")  # no such layer
    image = axes.imshow(grid, cmap=SEQUENTIAL, vmin=0, vmax=most, aspect="auto")
    crowded = sum(map(len, columns)) > 45
    slanted: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks(range(len(columns)), columns, **slanted)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylabel("layer")
    _paper_lines_between_cells(axes, grid.shape)
    if grid.size > 160:
        axes.figure.colorbar(image, ax=axes, label="directions")
        return
    for (row, column), value in numpy.ndenumerate(grid):
        if not math.isnan(value):
            ink = "white" if value > 0.5 * most else "black"
            axes.text(column, row, f"{value:.{decimals}f}", ha="center", va="center", color=ink, fontsize=9)


def _paper_lines_between_cells(axes: Axes, shape: tuple[int, ...]) -> None:
    axes.set_xticks(numpy.arange(shape[1] - 1) + 0.5, minor=True)
    axes.set_yticks(numpy.arange(shape[0] - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def _draw_spectra(axes: Axes, updates: Mapping[str, Update], column: Mapping[str, str]) -> None:
    columns = list(dict.fromkeys(column.values()))
    colours = list(OKABE_ITO.values())
    for name, update in updates.items():
        which = columns.index(column[name])
        positive = update.sigma[update.sigma > 0].numpy()
        axes.plot(
            range(1, len(positive) + 1),
            positive,
            color=colours[which % len(colours)],
            linestyle="-" if which < len(colours) else "--",
            marker="o" if len(update.sigma) <= 32 else None,
            markersize=3,
            linewidth=1.1,
            alpha=0.75,
            label=column[name],
        )
    axes.set(
        title="Singular values of ΔW, a line a layer", xlabel="direction i", ylabel=r"$\sigma_i$ (log scale)"
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    if not any(update.sigma.any() for update in updates.values()):
        axes.text(0.5, 0.5, "ΔW = 0: nothing learnt yet", ha="center", transform=axes.transAxes)
        return
    axes.set_yscale("log")
    by_module = {str(line.get_label()): line for line in axes.lines}
    axes.legend(by_module.values(), by_module.keys(), fontsize=8)


def draw_layer(
    name: str,
    update: Update,
    k: int,
    score_by_rank: Mapping[int, float] | None = None,
    score_name: str = "score",
) -> Picture:
    """ΔW, what k directions keep of it, its singular values, and the score (or the kept share) by rank.

    >>> import torch; from pefttutor.widgets.spectrum import decompose
    >>> draw_layer("q_proj", decompose(torch.eye(4)), k=3).alt
    'q_proj: rank 3 of 4 keeps 75 % of ‖ΔW‖². Effective rank 4.0, stable rank 4.0.'
    """
    n = len(update.sigma)
    cut = min(k, n)
    erank, srank = effective_rank(update.sigma), stable_rank(update.sigma)
    keeps = f"rank {cut} of {n} keeps {100 * update.kept(cut):.0f} % of ‖ΔW‖²"
    alt = f"{name}: {keeps}. Effective rank {erank:.1f}, stable rank {srank:.1f}."
    if score_by_rank:
        without, whole = score_by_rank[0], score_by_rank[max(score_by_rank)]
        alt += f" All layers at rank {k}: {score_name} {score_by_rank[k]:.3f}"
        alt += f" (without ΔW {without:.3f}, all of it {whole:.3f})."
    # Places by hand: laying out takes as long as drawing, and a slider waits for both.
    picture = Picture(9.6, 6.2, alt=alt, layout=None)
    upper = picture.add_gridspec(
        1, 3, left=0.075, right=0.92, top=0.945, bottom=0.5, width_ratios=[1, 1, 0.035]
    )
    lower = picture.add_gridspec(1, 2, left=0.075, right=0.985, top=0.37, bottom=0.085, wspace=0.2)
    left, right, scale = (picture.add_subplot(upper[i]) for i in range(3))
    bars, curve = (picture.add_subplot(lower[i]) for i in range(2))
    _draw_matrices(left, right, scale, update, cut)
    left.set_title(f"ΔW of {name}" if len(name) <= 40 else f"ΔW of …{name[-40:]}")
    right.set_title(keeps[0].upper() + keeps[1:])
    _draw_bars(bars, update, cut, erank)
    if score_by_rank:
        _draw_by_rank(curve, score_by_rank, k, ylabel=score_name, joined=False)
        curve.set_title(f"All layers at rank {k}: {score_name} {score_by_rank[k]:.3f}")
        curve.axhline(without, color=GREY, linestyle=":", linewidth=1)
        curve.annotate(
            "without ΔW", (1, without), xycoords=("axes fraction", "data"), ha="right", va="bottom"
        )
    else:
        percent_kept = {i: 100 * update.kept(i) for i in range(n + 1)}
        _draw_by_rank(curve, percent_kept, cut, ylabel="share of ‖ΔW‖² kept (%)")
        curve.set_title("What a rank keeps of this layer")
    return picture


def _draw_matrices(left: Axes, right: Axes, scale: Axes, update: Update, k: int) -> None:
    out, into = update.U.shape[0], update.Vh.shape[1]
    down, across = math.ceil(out / MAX_SHOWN), math.ceil(into / MAX_SHOWN)
    rows, columns = slice(None, None, down), slice(None, None, across)
    whole = update.matrix(rows=rows, columns=columns).numpy()
    part = update.matrix(k, rows=rows, columns=columns).numpy()
    # A few large entries must not bleach the rest.
    limit = float(numpy.quantile(numpy.abs(whole), 0.995)) or 1.0
    for axes, values in ((left, whole), (right, part)):
        image = axes.imshow(
            values, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto", extent=(0, into, out, 0)
        )
        axes.set_xlabel("input" + (f" (one in {across})" if across > 1 else ""))
        axes.spines[:].set_visible(True)
    left.set_ylabel("output" + (f" (one in {down})" if down > 1 else ""))
    left.figure.colorbar(image, cax=scale, label="entry of ΔW", extend="both")


def _draw_bars(axes: Axes, update: Update, k: int, erank: float) -> None:
    n, highest = len(update.sigma), float(update.sigma.max()) or 1.0
    colours = [OKABE_ITO["blue"] if i < k else "#C9C9C9" for i in range(n)]
    axes.bar(range(1, n + 1), update.sigma.numpy(), color=colours)
    axes.axvline(erank + 0.5, color=OKABE_ITO["vermillion"], linestyle="--", linewidth=1.2)
    side: dict[str, Any] = (
        {"ha": "right", "x": erank + 0.4} if erank > n / 2 else {"ha": "left", "x": erank + 0.6}
    )
    axes.text(
        y=1.16 * highest, s=f"effective rank {erank:.1f}", va="center", color=OKABE_ITO["vermillion"], **side
    )
    axes.set(xlim=(0.4, n + 0.6), ylim=(0, 1.25 * highest), xlabel="direction i", ylabel=r"$\sigma_i$ of ΔW")
    axes.set_title("Singular values: kept (blue), cut (grey)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_by_rank(
    axes: Axes, values: Mapping[int, float], k: int, *, ylabel: str, joined: bool = True
) -> None:
    """joined: whether all ranks are there; a line between two that are far apart would claim what lies between them."""
    ranks = sorted(values)
    dots = None if joined and len(ranks) > 64 else "o"
    line = "-" if joined else "none"
    shown: dict[str, Any] = {"marker": dots, "markersize": 4, "linestyle": line, "linewidth": 1.2}
    axes.plot(ranks, [values[i] for i in ranks], color=OKABE_ITO["blue"], **shown)
    axes.plot([k], [values[k]], color=OKABE_ITO["vermillion"], marker="o", markersize=9, linestyle="none")
    axes.set(xlabel="rank", ylabel=ylabel)
    axes.margins(y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
