"""The picture of `pefttutor.widgets.memory`: stacked bars against the memory of GPUs, the numbers, the advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

from matplotlib.axes import Axes

from pefttutor.memory import GIB, Breakdown
from pefttutor.widgets.memory_settings import GPUS, RESERVE, Change, Setting, attention_of
from pefttutor.widgets.style import GREY, OKABE_ITO, Picture

__all__ = ["draw_memory"]

COLOURS = {
    "weights": OKABE_ITO["blue"],
    "quantised weights": OKABE_ITO["sky"],
    "adapter weights": OKABE_ITO["purple"],
    "gradients": OKABE_ITO["orange"],
    "optimizer": OKABE_ITO["vermillion"],
    "activations": OKABE_ITO["green"],
}
MOST_ADVICE = 4
MOST_ABOVE = 1.6  # a GPU's line stands at most this many times as high as the bars, which stay to be seen
# How strongly each kind of activations is painted in their common colour: neighbours in the bar differ.
TINTS = {
    "embeddings": 0.6,
    "attention": 1.0,
    "ffn": 0.5,
    "norms": 0.8,
    "dropout": 0.3,
    "layer inputs": 1.0,
    "logits and loss": 0.2,
}
MOST_LETTERS = 50  # of a line beside its number


def draw_memory(
    setting: Setting, bars: Mapping[str, Breakdown], gpu: str, changes: Sequence[Change]
) -> Picture:
    """The picture of a setting: `bars` by name, the chosen one last; `changes` as `advice` gives them, none if it fits.

    >>> setting, bars = Setting("GPT-2", "full fine-tuning"), {"full fine-tuning": Breakdown(weights=8 * GIB)}
    >>> draw_memory(setting, bars, "T4", changes=[]).alt[:77]
    'GPT-2, full fine-tuning: 8.00 GiB, fits the T4 with 5.60 GiB to spare (14.6 G'
    """
    name, chosen = list(bars.items())[-1]
    total, capacity = chosen.total / GIB, GPUS[gpu]
    spare = capacity - RESERVE - total
    fits = f"fits the {gpu} with {_short(spare)} GiB to spare"
    verdict = fits if spare >= 0 else f"{_short(-spare)} GiB too much for the {gpu}"
    aside = f"{capacity:.1f} GiB less {RESERVE} GiB set aside"
    if (used := attention_of(setting)) != setting.attention:
        aside += f"; {setting.model} has {used} attention only"
    alt = f"{setting.model}, {name}: {_short(total)} GiB, {verdict} ({aside})."
    alt += f" In GiB: {_parts(chosen)}."
    if spare < 0:
        alt += " " + _summary(changes)
    picture = Picture(9.6, 5.4, alt=alt, layout=None)
    axes = picture.add_axes((0.075, 0.11, 0.46, 0.77))
    _draw_bars(axes, bars, capacity)
    axes.set_title(f"{setting.model}: {verdict}\n({aside})".replace("; ", ";\n"))
    table = picture.add_axes((0.58, 0.02, 0.41, 0.94))
    table.axis("off")
    _draw_table(table, chosen, changes, spare)
    return picture


def _draw_bars(axes: Axes, bars: Mapping[str, Breakdown], capacity: float) -> None:
    highest = max(capacity, *(b.total / GIB for b in bars.values()))
    gpus = [gib for gib in dict.fromkeys((capacity, *GPUS.values())) if gib <= MOST_ABOVE * highest]
    highest = max(highest, *gpus)
    for x, breakdown in enumerate(bars.values()):
        bottom = 0.0
        for part, size in breakdown.as_dict().items():
            if not size:
                continue
            colour = COLOURS[part.split(":")[0]]
            axes.bar(
                x, size / GIB, 0.55, bottom, color=colour, alpha=_tint(part), edgecolor="white", linewidth=0.4
            )
            bottom += size / GIB
        axes.text(x, bottom + 0.01 * highest, f"{_short(bottom)} GiB", ha="center", va="bottom")
    edge, written = len(bars) - 0.1, list[float]()
    for gib in gpus:
        if gib != capacity and any(abs(gib - other) <= 0.04 * highest for other in written):
            continue  # its name would stand over another's
        written.append(gib)
        names = ", ".join(gpu for gpu, size in GPUS.items() if size == gib)
        axes.axhline(gib, color="black" if gib == capacity else GREY, linestyle="--", linewidth=1)
        axes.text(edge - 0.02, gib, f"{names}: {gib} GiB", ha="right", va="bottom", fontsize=8)
    axes.set_xticks(range(len(bars)), [_wrapped(name) for name in bars])
    axes.set(xlim=(-0.5, edge), ylim=(0, 1.15 * highest), ylabel="memory of one training step (GiB)")


def _draw_table(axes: Axes, chosen: Breakdown, changes: Sequence[Change], spare: float) -> None:
    rows = [(part, size) for part, size in chosen.as_dict().items() if size and not _tiny(part, size)]
    rows.reverse()  # from the top, as the bar is stacked
    activations = sum(chosen.activations.values())
    y, step = 1.0, 0.044

    def line(left: str, right: str = "", **look: Any) -> None:
        nonlocal y
        axes.text(0.06, y, left, va="top", transform=axes.transAxes, **look)
        axes.text(1, y, right, va="top", ha="right", transform=axes.transAxes, **look)
        y -= step

    line("", "GiB", color="#444444")
    for part, size in rows:
        if part.startswith("activations") and activations:
            line("activations, of which", _short(activations / GIB))
            activations = 0
        if part.startswith("activations"):
            _key(axes, y, COLOURS["activations"], _tint(part))
            line("    " + part.removeprefix("activations: "), _short(size / GIB), fontsize=9, color="#444444")
        else:
            _key(axes, y, COLOURS[part])
            line(part, _short(size / GIB))
    line("total", _short(chosen.total / GIB), fontweight="bold")
    trained = f"{chosen.trained / 1e6:,.1f} million"
    line(f"{chosen.values / 1e6:,.1f} million values, of which train", trained, fontsize=9)
    enough = [gpu for gpu, gib in GPUS.items() if chosen.total / GIB + RESERVE <= gib]
    line(f"fits: {', '.join(enough) or 'none of ' + ', '.join(GPUS)}", fontsize=9)
    if spare >= 0:
        return
    y -= 0.6 * step
    line("What to change", "then GiB", fontweight="bold")
    for change in _shown(changes):
        look: dict[str, Any] = {"color": "#00664B" if change.fits else "#444444", "fontsize": 9}
        first, *rest = wrap(change.words, MOST_LETTERS)
        line(("✓ " if change.fits else "   ") + first, _short(change.total / GIB), **look)
        for words in rest:
            line("   " + words, **look)
    if not any(change.fits for change in changes):
        line("Nothing here is enough: more GPUs.", fontsize=9)


def _tint(part: str) -> float:
    return TINTS[part.removeprefix("activations: ")] if part.startswith("activations") else 1.0


def _key(axes: Axes, y: float, colour: str, tint: float = 1.0) -> None:
    axes.text(0, y + 0.004, "■", va="top", color=colour, alpha=tint, transform=axes.transAxes)


def _shown(changes: Sequence[Change]) -> list[Change]:
    """The ones that help most; what is done together stands last."""
    return list(changes) if len(changes) <= MOST_ADVICE else [*changes[: MOST_ADVICE - 1], changes[-1]]


def _summary(changes: Sequence[Change]) -> str:
    enough = [change.words for change in changes if change.fits]
    return f"To make it fit: {' or '.join(enough[:2])}." if enough else "No change here is enough."


def _parts(chosen: Breakdown) -> str:
    """The table in words, the largest part first, for who can't see it."""
    sizes = {part: size for part, size in chosen.as_dict().items() if not part.startswith("activations")}
    sizes["activations"] = sum(chosen.activations.values())
    order = sorted((part for part in sizes if sizes[part]), key=lambda part: -sizes[part])
    return ", ".join(f"{part} {_short(sizes[part] / GIB)}" for part in order)


def _tiny(part: str, size: int) -> bool:
    return part.startswith("activations") and size < 0.005 * GIB


def _short(gib: float) -> str:
    if 0 < gib < 0.005:
        return "< 0.01"
    return f"{gib:.0f}" if gib >= 99.5 else f"{gib:.1f}" if gib >= 9.95 else f"{gib:.2f}"


def _wrapped(name: str) -> str:
    head, on, tail = name.partition(" on ")
    return f"{head}\non {tail}" if on else name
