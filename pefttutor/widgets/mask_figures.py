"""The two pictures of `pefttutor.widgets.masks`: several choices side by side, and one choice in one tensor."""

from __future__ import annotations

from collections.abc import Mapping

import numpy
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from pefttutor.widgets.mask_source import kind_of, layer_of, overlap, share
from pefttutor.widgets.style import GREY, OKABE_ITO, SEQUENTIAL, Picture

CELLS = 96  # rows and columns of a heat map; of a larger matrix a cell is the share in a block

Masks = Mapping[str, Tensor]


def draw_overview(choices: Mapping[str, Masks]) -> Picture:
    """Share of chosen entries by layer and by kind of tensor, and how far the choices overlap.

    >>> draw_overview({"diagonal": {"weight": torch.eye(4).bool()}}).alt
    'Share of entries that train: diagonal 25.00%.'
    """
    names = list(choices)
    totals = {n: share(masks, dict.fromkeys(masks, ""))[""] for n, masks in choices.items()}
    shares = ", ".join(f"{name} {total:.2%}" for name, total in totals.items())
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    shared = {pair: overlap(choices[pair[0]], choices[pair[1]]) for pair in pairs}
    alt = f"Share of entries that train: {shares}."
    if shared:
        least, most = min(shared, key=lambda p: shared[p]), max(shared, key=lambda p: shared[p])
        alt += f" Overlap from {shared[least]:.0%} ({', '.join(least)}) to {shared[most]:.0%} ({', '.join(most)})."
    picture = Picture(10.6, 3.8, alt=alt)
    by_layer, by_kind, matrix = picture.subplots(1, 3, width_ratios=[1.1, 1.2, 0.9])
    first = choices[names[0]]
    for axes, groups, title in (
        (by_layer, layer_of(first), "By block"),
        (by_kind, {n: kind_of(n, t) for n, t in first.items()}, "By kind of tensor"),
    ):
        _draw_shares(axes, {name: share(masks, groups) for name, masks in choices.items()}, title)
    _draw_overlap(matrix, names, shared)
    _legend(picture, by_layer, "left")
    return picture


def _draw_shares(axes: Axes, shares: Mapping[str, Mapping[str, float]], title: str) -> None:
    groups = list(next(iter(shares.values())))
    width, colours = 0.8 / len(shares), list(OKABE_ITO.values())
    for i, (name, values) in enumerate(shares.items()):
        places = numpy.arange(len(groups)) + (i - (len(shares) - 1) / 2) * width
        heights = [100 * values[group] for group in groups]
        axes.bar(places, heights, width, label=name, color=colours[i % len(colours)])
    positive = [100 * value for values in shares.values() for value in values.values() if value > 0]
    if positive and max(positive) > 20 * min(positive):  # all biases next to 1 % of the matrices
        axes.set_yscale("log")
        steps = (1,) if max(positive) > 100 * min(positive) else (1, 2, 5)  # enough numbers, and not too many
        axes.yaxis.set_major_locator(LogLocator(subs=steps))
        axes.yaxis.set_major_formatter(lambda value, _: numpy.format_float_positional(value, trim="-"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    crowded = max(map(len, groups)) > 3
    axes.set_xticks(
        range(len(groups)), groups, rotation=35 if crowded else 0, ha="right" if crowded else "center"
    )
    axes.set(title=title, ylabel="chosen (% of the group's entries)")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def _legend(picture: Picture, axes: Axes, side: str) -> None:
    """Which colour is which, above all axes: inside of one it would lie on bars."""
    handles, labels = axes.get_legend_handles_labels()
    picture.legend(handles, labels, loc=f"outside upper {side}", ncols=len(labels), fontsize=9)


def _draw_overlap(axes: Axes, names: list[str], shared: Mapping[tuple[str, str], float]) -> None:
    grid = numpy.eye(len(names))
    for (a, b), value in shared.items():
        grid[names.index(a), names.index(b)] = grid[names.index(b), names.index(a)] = value
    axes.imshow(grid, cmap=SEQUENTIAL, vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(title="Shared entries")
    for (row, column), value in numpy.ndenumerate(grid):
        axes.text(
            column, row, f"{value:.0%}", ha="center", va="center", color="white" if value > 0.5 else "black"
        )


def draw_tensor(method: str, other: str, tensor: str, one: Masks, two: Masks) -> Picture:
    """One tensor's mask as a map, the shares by block and by kind, and the overlap with another choice.

    >>> mask = torch.eye(4).bool()
    >>> draw_tensor("this", "that", "weight", {"weight": mask}, {"weight": ~mask}).alt[-62:]
    'It shares 0% of its entries with that; chance would share 75%.'
    """
    mask = one[tensor]
    here, everywhere = mask.float().mean().item(), share(one, dict.fromkeys(one, ""))[""]
    common = overlap(one, two)
    alt = (
        f"{method} chooses {everywhere:.2%} of all entries and {here:.2%} of {tensor} {tuple(mask.shape)}. "
        f"It shares {common:.0%} of its entries with {other}; chance would share {_chance(one, two):.0%}."
    )
    picture = Picture(10.6, 4.0, alt=alt)
    left, middle, right = picture.subplots(1, 3, width_ratios=[1.3, 1, 1.1])
    shown = shrunk(mask)
    image = left.imshow(shown, cmap=SEQUENTIAL, vmin=0, vmax=max(float(shown.max()), 1e-9), aspect="auto")
    left.set(title=tensor.removesuffix(".weight")[-34:], xlabel="column", ylabel="row")
    left.set_xticks([0, shown.shape[1] - 1], [0, (mask.shape[-1] if mask.dim() else 1) - 1])
    left.set_yticks([0, shown.shape[0] - 1], [0, (mask.shape[0] if mask.dim() > 1 else 1) - 1])
    picture.colorbar(image, ax=left, label="share chosen")
    layers = layer_of(one)
    for axes, groups, title in (
        (middle, layers, "By block"),
        (right, {n: kind_of(n, t) for n, t in one.items()}, "By kind of tensor"),
    ):
        _draw_shares(axes, {method: share(one, groups), other: share(two, groups)}, title)
        axes.axhline(100 * everywhere, color=GREY, linewidth=1, linestyle="--")
    _legend(picture, middle, "right")
    return picture


def _chance(one: Masks, two: Masks) -> float:
    """What two choices of these sizes share if one is drawn at random: the larger one's share of everything."""
    return max(share(masks, dict.fromkeys(masks, ""))[""] for masks in (one, two))


def shrunk(mask: Tensor) -> numpy.ndarray:
    """A mask as a picture of at most CELLS × CELLS; each cell is the share of chosen entries in its block.

    >>> shrunk(torch.eye(200).bool()).shape, shrunk(torch.ones(5).bool()).shape
    ((96, 96), (1, 5))
    """
    flat = mask.float().reshape(mask.shape[0], -1) if mask.dim() > 1 else mask.float().reshape(1, -1)
    size = (min(CELLS, flat.shape[0]), min(CELLS, flat.shape[1]))
    return torch.nn.functional.adaptive_avg_pool2d(flat[None, None], size)[0, 0].numpy()
