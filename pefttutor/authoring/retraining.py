"""Which tables of data/lessons are out of date, how long they take, and training those."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pefttutor.authoring.runs import Row
from pefttutor.authoring.tables import best, changed
from pefttutor.models.carriers import root

__all__ = ["State", "scripts", "state", "train"]


@dataclass(frozen=True)
class State:
    """Of one table: why it must be trained (None if it needn't), its rows, and the minutes of one core they took."""

    name: str
    why: str | None
    rows: int = 0
    minutes: float | None = None

    def __str__(self) -> str:
        took = "an unknown time" if self.minutes is None else f"{self.minutes:.0f} minutes of one core"
        return f"{self.name}: {self.why or 'up to date'} ({self.rows} rows, {took})"


def scripts(names: Iterable[str] = ()) -> list[Path]:
    """The scripts that train tables: all of data/lessons, or those whose name, such as 09/compare_masks, begins so.

    >>> [path.name for path in scripts(["09"])]
    ['compare_masks.py']

    Raises: ValueError for a name that none begins with.
    """
    found = sorted((root() / "lessons").glob("*/*.py"))
    known = {f"{path.parent.name}/{path.stem}": path for path in found}
    chosen: dict[str, Path] = {}
    for name in names:
        those = {key: path for key, path in known.items() if key.startswith(name)}
        if not those:
            raise ValueError(f"no table is called {name!r}; there are {', '.join(known)}")
        chosen |= those
    return list(chosen.values()) if names else found


def state(script: Path) -> State:
    """Whether a script's table is up to date: made by this script with these weights and tasks, to its end.

    >>> state(scripts(["09"])[0]).why is None
    True
    """
    name, path = f"{script.parent.name}/{script.stem}", script.with_suffix(".jsonl")
    if not path.exists():
        return State(name, "not trained yet")
    header, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    took = [row["seconds"] for row in rows if "seconds" in row]
    minutes = sum(took) / len(took) * len(rows) / 60 if took else None
    others = changed(script, header)
    why = f"made with another {' and another '.join(others)}" if others else None
    if not others and not _complete(header, rows):
        why = "stopped before its end"
    return State(name, why, len(rows), minutes)


def _complete(header: Row, rows: Sequence[Row]) -> bool:
    if "search_seeds" not in header:
        return len(rows) >= len(header["seeds"])
    try:
        return len(best(header, rows)) > 0
    except ValueError:
        return False


def train(script: Path) -> float:
    """Run a script to the end of its table, from where it was stopped; the seconds that it took.

    Raises: RuntimeError if it fails; the rows that were trained until then are kept.
    """
    start = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{script.parent.name}/{script.name} ended with status {done.returncode}; run it again to go on"
        )
    return time.perf_counter() - start
