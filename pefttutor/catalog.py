"""Which methods exist: every family's folder names its method classes in `__all__`."""

from __future__ import annotations

import importlib

__all__ = ["FAMILIES", "methods"]

# The chapter's taxonomy, 4.2, 4.4 and 4.3, and what mixes them.
FAMILIES = ("additive", "lowrank", "selective", "hybrid")


def methods() -> dict[str, type]:
    """All method classes by name. Only these can be named in a saved adapter.

    >>> "LoRA" in methods()
    True
    """
    folders = [importlib.import_module(f"pefttutor.{family}") for family in FAMILIES]
    return {name: getattr(folder, name) for folder in folders for name in folder.__all__}
