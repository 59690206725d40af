"""Training the runs of a table: each once, the learning rate of each case searched, several at a time.

A table is a file of JSON lines: a header (the command, sha256 of script and model, fingerprints of the tasks, settings,
versions), then one run a line, written as soon as it is trained. So a script that was stopped goes on where it was, and
one that was changed starts again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from pefttutor.authoring.provenance import provenance
from pefttutor.saving.files import write_atomically

__all__ = ["Row", "Table", "compare"]

Row = dict[str, Any]
Train = Callable[..., Mapping[str, float]]
Window = tuple[float, float]
PROCESSES = (
    "PEFTTUTOR_PROCESSES"  # runs trained at a time; without it as many as there are cores, at most two
)


class Table:
    """The runs of `train`, by their arguments: what isn't in the file is trained when it is asked for.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     row = Table(Path(folder, "try.jsonl"), {}, ("lr", "seed"), lambda lr, seed: {"validation": 1 - lr})[0.1, 0]
    >>> row
    {'lr': 0.1, 'seed': 0, 'validation': 0.9, 'seconds': 0.0}

    path: the file, whose rows are kept if its header is this one; if only the versions differ, it then names both.
    columns: the names of train's arguments.
    train(*key) → {name: number}, rounded to six digits. Beside it stands how many seconds it took.
    """

    def __init__(self, path: Path, header: Row, columns: Sequence[str], train: Train) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        header = json.loads(json.dumps(header))  # as a file gives it back: names are strings, tuples lists
        kept = []
        if lines and (both := _continued(json.loads(lines[0]), header)):
            header, kept = both, [json.loads(line) for line in lines[1:]]
        self.path, self.columns, self.train, self.header = path, tuple(columns), train, json.dumps(header)
        self.rows = {tuple(row[name] for name in self.columns): row for row in kept}
        self._writing = Lock()
        self.map: Callable[..., Iterable[Any]] = map  # or that of an executor: how `all` trains

    def all(self, keys: Iterable[tuple[Any, ...]]) -> None:
        """Train what is missing of these, as many at a time as `map` has workers."""
        list(self.map(self.__getitem__, keys))

    def __getitem__(self, key: tuple[Any, ...]) -> Row:
        if key not in self.rows:
            start = time.perf_counter()
            scores = {name: round(value, 6) for name, value in self.train(*key).items()}
            seconds = round(time.perf_counter() - start, 1)
            with self._writing:
                self.rows[key] = dict(zip(self.columns, key, strict=True)) | scores | {"seconds": seconds}
                self._write()
            print(json.dumps(self.rows[key]), file=sys.stderr, flush=True)
        return self.rows[key]

    def _write(self) -> None:
        write_atomically(self.path, "\n".join([self.header, *map(json.dumps, self.rows.values())]) + "\n")

    def sort(self, keys: Iterable[tuple[Any, ...]]) -> None:
        """Write the rows in the order of these keys, whichever was trained first."""
        order = {key: i for i, key in enumerate(keys)}
        self.rows = dict(sorted(self.rows.items(), key=lambda item: order[item[0]]))
        self._write()

    def best_rates(
        self,
        case: tuple[Any, ...],
        rates: Sequence[float],
        windows: Sequence[Window | None],
        seeds: Sequence[int],
    ) -> tuple[float | None, ...]:
        """The learning rate of each phase with the best mean validation over the seeds; the smaller of two equal ones.

        windows: of each phase the first and the last of `rates` to try, or None for a phase that has no rate. All
        pairs are tried where there are two phases. A window is widened as long as the best lies at its edge.
        """
        spans = [None if w is None else (rates.index(w[0]), rates.index(w[1])) for w in windows]
        while True:
            sides = [[None] if span is None else rates[span[0] : span[1] + 1] for span in spans]
            grid = list(product(*sides))
            self.all((*case, *tried, seed) for tried in grid for seed in seeds)
            sums = [sum(self[*case, *tried, seed]["validation"] for seed in seeds) for tried in grid]
            best = grid[sums.index(max(sums))]
            wider = [
                span and _wider(span, rates.index(rate), len(rates) - 1)
                for span, rate in zip(spans, best, strict=True)
            ]
            if wider == spans:
                return best
            spans = wider


def _wider(span: tuple[int, int], best: int, last: int) -> tuple[int, int]:
    """One place more on the side where the best lies at the edge."""
    low, high = span
    if best == low > 0:
        return low - 1, high
    return low, high + (best == high < last)


def _continued(before: Row, now: Row) -> Row | None:
    """The header of a table that another Python or torch goes on with: it names both. None if more has changed."""

    def rest(header: Row) -> Row:
        return {name: value for name, value in header.items() if name not in ("python", "versions")}

    def named(then: str, here: str) -> str:
        return then if here in then.split(" and ") else f"{then} and {here}"

    if rest(before) != rest(now):
        return None
    then, here = before.get("versions", {}), now.get("versions", {})
    versions = {name: named(then.get(name, value), value) for name, value in here.items()}
    python = named(before.get("python", ""), now.get("python", ""))
    return now | ({"python": python, "versions": versions} if here else {})


# ---- several at a time


def _processes() -> int:
    asked = os.environ.get(PROCESSES, "")
    if asked and not (asked.isdecimal() and int(asked)):
        raise ValueError(f"{PROCESSES}={asked!r}; expected how many runs to train at a time, such as 2")
    return int(asked) if asked else min(2, os.cpu_count() or 1)


@contextmanager
def _workers(train: Train) -> Iterator[tuple[Train, int]]:
    """Something to call like `train` from as many threads as processes work behind it, each on one core."""
    count = _processes()
    # Another process finds a function by its name: that of the script itself.
    if count == 1 or getattr(sys.modules.get("__main__"), "train", None) is not train:
        torch.set_num_threads(1)
        yield train, 1
        return
    context = multiprocessing.get_context("spawn")  # a fork would share torch's threads
    pool = ProcessPoolExecutor(count, context, torch.set_num_threads, (1,))
    try:
        yield lambda *key: pool.submit(train, *key).result(), count
    finally:
        pool.shutdown(cancel_futures=True)


def compare(
    script: Path | str,
    train: Train,
    cases: Mapping[tuple[Any, ...], Window | Sequence[Window | None] | None],
    *,
    columns: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
    search_seeds: Sequence[int],
    model: str,
    tasks: Sequence[str],
    phases: Sequence[str] = ("lr",),
    **settings: Any,
) -> None:
    """Run every case at its own learning rate with every seed; the table stands beside the script, as its name.jsonl.

        compare(__file__, train, {("LoRA", 8): (1e-3, 1e-2)}, columns=("method", "r"), rates=RATES, seeds=range(5), …)

    train(*case, lr, seed) → {"validation": share, "test": share}. cases: each with the window of rates to try first, or
    None for what has no rate, such as a head that is fitted to its end.
    columns: the names of a case's parts. The search looks at validation and search_seeds only. If the script itself
    defines `train`, two processes work side by side (PEFTTUTOR_PROCESSES), each on one core.
    phases: the names of the learning rates where ways have several, such as ("first_lr", "lr"); then
    train(*case, first_lr, lr, seed), and a case has a window or None for each.
    """
    settings |= {"seeds": list(seeds), "search_seeds": list(search_seeds), "phases": list(phases)}
    header = provenance(Path(script), model=model, tasks=tasks, **settings)

    def finish(case: tuple[Any, ...]) -> None:
        given = cases[case]
        windows: Any = [given] if len(phases) == 1 else given or [None] * len(phases)
        nothing = (None,) * len(phases)
        chosen = table.best_rates(case, rates, windows, search_seeds) if any(windows) else nothing
        table.all((*case, *chosen, seed) for seed in seeds)

    with (
        _workers(train) as (run, count),
        ThreadPoolExecutor(count) as runs,
        ThreadPoolExecutor(len(cases)) as threads,
    ):
        table = Table(Path(script).with_suffix(".jsonl"), header, (*columns, *phases, "seed"), run)
        table.map = runs.map
        list(threads.map(finish, cases))
    place = {case: i for i, case in enumerate(cases)}
    order = {seed: i for i, seed in enumerate(dict.fromkeys([*search_seeds, *seeds]))}
    n = len(columns)
    table.sort(
        sorted(table.rows, key=lambda key: (place[key[:n]], [r or 0.0 for r in key[n:-1]], order[key[-1]]))
    )
