"""Tables of training runs behind a lesson: the lesson reads them, and learns where they come from.

How they are trained is in `pefttutor.authoring.runs`, what their differences say in `pefttutor.authoring.evidence`.
`python -m pefttutor.authoring tables` says which are out of date, and trains these.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pefttutor import data, models
from pefttutor.authoring.provenance import digests, provenance
from pefttutor.authoring.runs import Row, Table, compare
from pefttutor.data.evaluation import evaluate
from pefttutor.models.carriers import root

__all__ = [
    "Table", "best", "changed", "compare", "drawn", "prepared", "provenance", "read", "scores", "searched",
]  # fmt: skip


def read(name: str) -> tuple[Row, list[Row]]:
    """Header and rows of data/lessons/`name`, such as "09/compare_masks.jsonl".

    >>> header, rows = read("09/compare_masks.jsonl")
    >>> header["command"]
    'python data/lessons/09/compare_masks.py'

    Raises: FileNotFoundError if it was never trained; ValueError if the script, the model or a task has changed since.
    """
    path = root() / "lessons" / name
    if not path.exists():
        command = f"python data/lessons/{path.parent.name}/{path.stem}.py"
        raise FileNotFoundError(f"{name} has not been trained; run {command}")
    header, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    for what, (then, now) in changed(path.with_suffix(".py"), header).items():
        raise ValueError(
            f"{name} was made with another {what} ({then[:12]}…, now {now[:12]}…); "
            f"run {header['command']}, or git checkout the {what} that made it"
        )
    return header, rows


def changed(script: Path, header: Row) -> dict[str, tuple[str, str]]:
    """What a table with this header was made with that is another now: digests of then and now, by its name."""
    now = digests(script, header["model"], header["tasks"])
    found = {what: (header[f"{what}_sha256"], now[f"{what}_sha256"]) for what in ("script", "model")}
    found |= {f"task {task}": (then, now["tasks"][task]) for task, then in header["tasks"].items()}
    return {what: (then, digest) for what, (then, digest) in found.items() if then != digest}


def searched(header: Row, rows: Sequence[Row]) -> dict[tuple[Any, ...], dict[float, float]]:
    """Of each case the learning rates that its search tried, and the mean validation at each.

    The best one lies at an edge if it is the smallest or the largest: then a better one may lie beyond.

    >>> header = {"seeds": [0], "search_seeds": [7, 8]}
    >>> rows = [{"r": 8, "lr": lr, "seed": s, "validation": lr + s / 10} for lr in (0.1, 0.2) for s in (7, 8)]
    >>> searched(header, rows)[8,]
    {0.1: 0.85, 0.2: 0.95}
    """
    seeds, found = set(header["search_seeds"]), {}
    for case, by_rate in _by_rate(header, rows).items():
        found[case] = {
            rate: sum(by_seed[seed]["validation"] for seed in header["search_seeds"]) / len(seeds)
            for rate, by_seed in sorted(by_rate.items(), key=lambda item: _order(item[0]))
            if any(_order(rate)) and seeds <= set(by_seed)
        }
    return found


def best(header: Row, rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Of each case the rows at the learning rate that its search chose, one for each seed of the header.

    >>> header = {"seeds": [0, 1], "search_seeds": [0]}
    >>> rows = [{"r": 8, "lr": lr, "seed": s, "validation": 1 - lr} for lr in (0.1, 0.5) for s in (0, 1)]
    >>> [row["lr"] for row in best(header, rows)[8,]]
    [0.1, 0.1]

    Raises: ValueError for a table that was stopped before its end.
    """
    cases, chosen = _by_rate(header, rows), {}
    for case, tried in searched(header, rows).items():
        # Of equal ones the first, which is the smaller. What has no rate is filed under None for each phase.
        rate = max(tried, key=lambda rate: tried[rate]) if tried else next(iter(cases[case]))
        by_seed = cases[case][rate]
        if missing := [seed for seed in header["seeds"] if seed not in by_seed]:
            raise ValueError(
                f"the table was stopped before its end: {case} at lr={rate} lacks the seeds {missing}; "
                f"run {header.get('command', 'its script')}, which goes on where it was"
            )
        chosen[case] = [by_seed[seed] for seed in header["seeds"]]
    return chosen


def _by_rate(header: Row, rows: Sequence[Row]) -> dict[tuple[Any, ...], dict[Any, dict[int, Row]]]:
    """Rows by case, which is all that stands before the learning rates, then by rate (several: a tuple) and seed."""
    phases = header.get("phases", ["lr"])
    cases: dict[tuple[Any, ...], dict[Any, dict[int, Row]]] = {}
    for row in rows:
        names = list(row)
        case = tuple(row[name] for name in names[: names.index(phases[0])])
        rate = row["lr"] if len(phases) == 1 else tuple(row[name] for name in phases)
        cases.setdefault(case, {}).setdefault(rate, {})[row["seed"]] = row
    return cases


def _order(rate: Any) -> list[float]:
    """What to sort a rate by; zeros alone for what has none."""
    return [one or 0.0 for one in (rate if isinstance(rate, tuple) else (rate,))]


def scores(model: Any, name: str, task: str, *, searching: bool = False) -> dict[str, float]:
    """What a row says of an adapted classifier: accuracy on validation and test, and how much worse it reads the world.

    forgotten = held_out_loss(adapted) − held_out_loss(base), in nats per token

    >>> base, _ = prepared("campus-nano", "sentiment")
    >>> scores(base, "campus-nano", "sentiment")["forgotten"]
    0.0

    model: trained from `prepared(name, task)`. searching: the accuracy on validation alone, for a seed that searches
        a rate and should see nothing else. Cost: that of `evaluate` twice and of `held_out_loss` once; of `evaluate`.
    """
    splits = prepared(name, task)[1]
    found = {"validation": evaluate(model, splits["validation"])["accuracy"]}
    if searching:
        return found
    found["test"] = evaluate(model, splits["test"])["accuracy"]
    tokenizer, before = _before(name)
    return found | {"forgotten": data.held_out_loss(model, tokenizer) - before}


@cache
def _before(name: str) -> tuple[Any, float]:
    model, tokenizer = models.load(name, head="classification", num_labels=2)
    return tokenizer, data.held_out_loss(model, tokenizer)


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
