"""Tables of training runs behind a lesson: a script trains them, the lesson reads them and learns where they come from.

A table is a file of JSON lines: a header (the command, sha256 of script and model, fingerprints of the tasks, settings,
versions), then one run a line, written as soon as it is trained. So a script that was stopped goes on where it was, and
one that was changed starts again.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pefttutor import data, models
from pefttutor.models.carriers import root
from pefttutor.saving.files import write_atomically

__all__ = ["Table", "best", "compare", "drawn", "prepared", "provenance", "read"]

Row = dict[str, Any]


def provenance(script: Path, *, model: str, tasks: Sequence[str], **settings: Any) -> Row:
    """The header of the table that `script`, in its lesson's folder of data/lessons, makes with an embedded model.

    >>> script = root() / "lessons" / "09" / "compare_masks.py"
    >>> provenance(script, model="campus-nano", tasks=("sentiment",), steps=200)["command"]
    'python data/lessons/09/compare_masks.py'
    """
    about = {task: root() / "tasks" / task / "task.json" for task in tasks}
    return {
        "command": f"python data/lessons/{script.parent.name}/{script.name}",
        "script_sha256": _sha256(script),
        "model": model,
        "model_sha256": _sha256(_weights(model)),
        "tasks": {task: json.loads(path.read_text())["fingerprint"] for task, path in about.items()},
        **settings,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "pefttutor")},
    }


class Table:
    """The runs of `train`, by their arguments: what isn't in the file is trained when it is asked for.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     Table(Path(folder, "try.jsonl"), {}, ("lr", "seed"), lambda lr, seed: {"validation": 1 - lr})[0.1, 0]
    {'lr': 0.1, 'seed': 0, 'validation': 0.9}

    path: the file, whose rows are kept if its header is this one. columns: the names of train's arguments.
    train(*key) → {name: number}, rounded to six digits.
    """

    def __init__(
        self, path: Path, header: Row, columns: Sequence[str], train: Callable[..., Mapping[str, float]]
    ) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        header = json.loads(json.dumps(header))  # as a file gives it back: names are strings, tuples lists
        self.path, self.columns, self.train = path, tuple(columns), train
        self.lines = lines if lines and json.loads(lines[0]) == header else [json.dumps(header)]
        rows = [json.loads(line) for line in self.lines[1:]]
        self.rows = {tuple(row[name] for name in self.columns): row for row in rows}

    def __getitem__(self, key: tuple[Any, ...]) -> Row:
        if key not in self.rows:
            scores = {name: round(value, 6) for name, value in self.train(*key).items()}
            self.rows[key] = dict(zip(self.columns, key, strict=True)) | scores
            self.lines.append(json.dumps(self.rows[key]))
            write_atomically(self.path, "\n".join(self.lines) + "\n")
            print(self.lines[-1], file=sys.stderr, flush=True)
        return self.rows[key]

    def best_rate(
        self, case: tuple[Any, ...], rates: Sequence[float], window: tuple[float, float], seeds: Sequence[int]
    ) -> float:
        """The learning rate with the best mean validation over the seeds; the smaller one if two are equal.

        window: the first and the last of `rates` to try; widened as long as the best lies at its edge.
        """
        low, high = (rates.index(rate) for rate in window)
        while True:
            sums = [
                sum(self[*case, rate, seed]["validation"] for seed in seeds) for rate in rates[low : high + 1]
            ]
            highest = low + sums.index(max(sums))
            if highest == low > 0:
                low -= 1
            elif highest == high < len(rates) - 1:
                high += 1
            else:
                return rates[highest]


def compare(
    script: Path | str,
    train: Callable[..., Mapping[str, float]],
    cases: Mapping[tuple[Any, ...], tuple[float, float]],
    *,
    columns: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
    search_seeds: Sequence[int],
    model: str,
    tasks: Sequence[str],
    **settings: Any,
) -> None:
    """Run every case at its own learning rate with every seed; the table stands beside the script, as its name.jsonl.

        compare(__file__, train, {("LoRA", 8): (1e-3, 1e-2)}, columns=("method", "r"), rates=RATES, seeds=range(5), …)

    train(*case, lr, seed) → {"validation": share, "test": share}. cases: each with the window of rates to try first.
    columns: the names of a case's parts. The search looks at validation and search_seeds only.
    """
    torch.set_num_threads(1)
    script = Path(script)
    settings |= {"seeds": list(seeds), "search_seeds": list(search_seeds)}
    header = provenance(script, model=model, tasks=tasks, **settings)
    table = Table(script.with_suffix(".jsonl"), header, (*columns, "lr", "seed"), train)
    for case, window in cases.items():
        rate = table.best_rate(case, rates, window, search_seeds)
        for seed in seeds:
            table[*case, rate, seed]


def read(name: str) -> tuple[Row, list[Row]]:
    """Header and rows of data/lessons/`name`, such as "09/compare_masks.jsonl".

    >>> header, rows = read("09/compare_masks.jsonl")
    >>> header["command"]
    'python data/lessons/09/compare_masks.py'

    Raises: ValueError if the script or the model has changed since.
    """
    path = root() / "lessons" / name
    header, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    now = {
        "script": _sha256(path.with_suffix(".py")),
        "model": _sha256(_weights(header["model"])),
    }
    for what, digest in now.items():
        if header[f"{what}_sha256"] != digest:
            raise ValueError(
                f"{name} was made with another {what} ({header[f'{what}_sha256'][:12]}…, now {digest[:12]}…); "
                f"run {header['command']}, or git checkout the {what} that made it"
            )
    return header, rows


def best(header: Row, rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Of each case the rows at the learning rate that its search chose, one for each seed of the header.

    >>> header = {"seeds": [0, 1], "search_seeds": [0]}
    >>> rows = [{"r": 8, "lr": lr, "seed": s, "validation": 1 - lr} for lr in (0.1, 0.5) for s in (0, 1)]
    >>> [row["lr"] for row in best(header, rows)[8,]]
    [0.1, 0.1]
    """
    cases: dict[tuple[Any, ...], dict[float, dict[int, Row]]] = {}
    for row in rows:
        names = list(row)
        case = tuple(row[name] for name in names[: names.index("lr")])
        cases.setdefault(case, {}).setdefault(row["lr"], {})[row["seed"]] = row
    chosen: dict[tuple[Any, ...], list[Row]] = {}
    for case, by_rate in cases.items():
        searched = {
            rate: sum(by_seed[seed]["validation"] for seed in header["search_seeds"])
            for rate, by_seed in sorted(by_rate.items())
            if set(header["search_seeds"]) <= set(by_seed)
        }
        rate = max(searched, key=lambda rate: searched[rate])  # of equal ones the first: the smaller
        chosen[case] = [by_rate[rate][seed] for seed in header["seeds"]]
    return chosen


@cache
def prepared(model: str, task: str) -> tuple[Any, dict[str, list[Any]]]:
    """An embedded model with a new head for a task's classes, and the encoded splits. Copy before you train."""
    classifier, words = models.load(model, head="classification", labels=list(data.info(task).labels or ()))
    return classifier, {name: data.encode(split, words) for name, split in data.load(task).items()}


@cache
def drawn(model: str, task: str, n: int, seed: int) -> list[Any]:
    """n of the task's training examples, encoded for the model and drawn by the seed.

    >>> drawn("campus-nano", "sentiment", 4, seed=0)[:2] == drawn("campus-nano", "sentiment", 2, seed=0)
    True
    """
    examples = prepared(model, task)[1]["train"]
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    return [examples[i] for i in order[:n].tolist()]


def _weights(model: str) -> Path:
    return root() / "models" / model / "model.safetensors"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
