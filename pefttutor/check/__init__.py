"""The exercises' checks: `from pefttutor import check`, then `name = check.ex12_1(name)` in the cell after the stub.

    not attempted   says so and returns the reference, so that everything below still runs
    wrong           an AssertionError: the input, what was expected, what came, the likely mistake
    right           says so and returns the learner's own

One module per notebook (`ex12.py` holds `ex12_1`, `ex12_2`, …), loaded when its first check is asked for. A check
needs no cell metadata, no test folder and no network: a homework repository only installs the package.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def __getattr__(name: str) -> Callable[[Any], Any]:
    """`check.ex12_1`, from pefttutor/check/ex12.py (PEP 562)."""
    match = re.fullmatch(r"(ex\d\d)_\d+", name)
    if match and match[1] in _lessons():
        module = importlib.import_module(f"{__name__}.{match[1]}")
        if hasattr(module, name):
            return getattr(module, name)
        known = ", ".join(sorted(entry for entry in vars(module) if entry.startswith(f"{match[1]}_")))
        raise AttributeError(f"check has no {name!r}; notebook {match[1][2:]} has {known}")
    raise AttributeError(
        f"check has no {name!r}; there are exercises for {', '.join(_lessons()) or 'no notebook'}"
    )


def _lessons() -> list[str]:
    return sorted(path.stem for path in Path(__file__).parent.glob("ex[0-9][0-9].py"))


def __dir__() -> list[str]:
    modules = [importlib.import_module(f"{__name__}.{lesson}") for lesson in _lessons()]
    return sorted(name for module in modules for name in vars(module) if re.fullmatch(r"ex\d\d_\d+", name))
