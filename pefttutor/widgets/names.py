"""Where a layer stands in a grid of layers and modules, and what it is called there."""

from __future__ import annotations

from collections.abc import Iterable


def place(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Row (layer) and column (module) of each dotted name: "model.layers.3.self_attn.q_proj" is ("3", "q_proj").

    The first number that something follows is the layer; names are as short as they can be and stay different.

    >>> place(["layers.3.attn.out", "layers.3.mlp.out"])
    {'layers.3.attn.out': ('3', 'attn.out'), 'layers.3.mlp.out': ('3', 'mlp.out')}
    """
    split: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {}
    for name in names:
        parts = tuple(name.split("."))
        at = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
        split[name] = ((), "", parts) if at is None else (parts[:at], parts[at], parts[at + 1 :])
    block_list = _shortest(before for before, number, _ in split.values() if number)
    module = _shortest(after for _, _, after in split.values())
    several = len(block_list) > 1
    return {
        name: (f"{block_list[before]} {number}" if several and number else number or "–", module[after])
        for name, (before, number, after) in split.items()
    }


def _shortest(paths: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Each path by its shortest ending that no other path has."""
    distinct = set(paths)
    short: dict[tuple[str, ...], str] = {}
    for path in distinct:
        lengths = range(1, len(path) + 1)
        unique = (
            i for i in lengths if not any(other != path and other[-i:] == path[-i:] for other in distinct)
        )
        short[path] = ".".join(path[-next(unique, len(path)) :])
    return short
