"""Lesson 08: the head alone, BitFit and full fine-tuning of campus-nano on 16 to 1000 reviews, over ten seeds.

    python data/lessons/08/compare_sizes.py        about ten minutes on one quiet core; goes on where it was stopped

A seed draws the reviews and their order. Each way gets its learning rate for each size by the mean accuracy of two
other seeds on the validation split; the window of three rates is widened while the best lies at its edge.

Writes sizes.jsonl beside this file: in the first line where the table comes from, then one run a line. The seeds of
the search have an accuracy on the validation split, the others one on the test split. Lesson 08 reads it.
"""

import copy
import hashlib
import json
import platform
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

import pefttutor
from pefttutor import data, models
from pefttutor.carriers import root
from pefttutor.files import write_atomically

MODEL, TASK, HEAD = "campus-nano", "sentiment", ("score",)
SIZES = [16, 64, 256, 1000]
GRID = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]
WINDOWS = {"frozen + head": (1e-2, 1e-1), "BitFit": (3e-3, 3e-2), "full": (3e-4, 3e-3)}
SEEDS, SEARCH_SEEDS, BATCH = list(range(10)), [100, 101], 16
TABLE = Path(__file__).with_name("sizes.jsonl")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def provenance():
    """Where the table comes from; rows of another provenance are thrown away."""
    return {
        "command": "python data/lessons/08/compare_sizes.py",
        "script_sha256": sha256(Path(__file__)),
        "model": MODEL,
        "model_sha256": sha256(root() / "models" / MODEL / "model.safetensors"),
        "task": TASK,
        "fingerprint": json.loads((root() / "tasks" / TASK / "task.json").read_text())["fingerprint"],
        "seeds": SEEDS,
        "search_seeds": SEARCH_SEEDS,
        "steps": {str(n): steps(n) for n in SIZES},
        "batch_size": BATCH,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "pefttutor")},
    }


def steps(n):
    """60, or two passes over the reviews where that is more."""
    return max(60, 2 * -(-n // BATCH))


@cache
def prepared():
    """The base with its new head, and the encoded splits."""
    model, words = models.load(MODEL, head="classification", labels=list(data.info(TASK).labels))
    return model, {name: data.encode(split, words) for name, split in data.load(TASK).items()}


def accuracy(n, way, lr, seed, split):
    """Train campus-nano in one way on the n reviews of a seed."""
    base, splits = prepared()
    order = torch.randperm(len(splits["train"]), generator=torch.Generator().manual_seed(seed))[:n]
    model = copy.deepcopy(base)
    if way != "full":
        rule = pefttutor.LinearProbe if way == "frozen + head" else pefttutor.BitFit
        rule(modules_to_save=HEAD).attach(model)
    examples = [splits["train"][i] for i in order.tolist()]
    pefttutor.fit(model, examples, steps=steps(n), batch_size=BATCH, lr=lr, seed=seed)
    return round(pefttutor.evaluate(model, splits[split])["accuracy"], 6)


class Table:
    """The runs so far: what isn't in the file with today's provenance is run, and written at once."""

    def __init__(self):
        self.header, self.rows = provenance(), {}
        lines = TABLE.read_text().splitlines() if TABLE.exists() else []
        if lines and json.loads(lines[0]) == self.header:
            self.rows = {tuple(row[key] for key in self.keys): row for row in map(json.loads, lines[1:])}

    keys = ("n", "way", "lr", "seed")

    def get(self, *key, split):
        if key not in self.rows:
            self.rows[key] = dict(zip(self.keys, key, strict=True)) | {split: accuracy(*key, split)}
            lines = [json.dumps(line) for line in (self.header, *self.rows.values())]
            write_atomically(TABLE, "\n".join(lines) + "\n")
            print(lines[-1], file=sys.stderr, flush=True)
        return self.rows[key][split]


def best_lr(table, n, way):
    """The rate with the best mean over the seeds of the search; the smaller one if two are equal."""
    first, last = (GRID.index(lr) for lr in WINDOWS[way])
    while True:
        rates = GRID[first : last + 1]
        sums = [sum(table.get(n, way, lr, seed, split="validation") for seed in SEARCH_SEEDS) for lr in rates]
        best = sums.index(max(sums))
        if best == 0 and first > 0:
            first -= 1
        elif best == len(rates) - 1 and last < len(GRID) - 1:
            last += 1
        else:
            return rates[best]


def main():
    torch.set_num_threads(1)
    table = Table()
    rates = {(n, way): best_lr(table, n, way) for n in SIZES for way in WINDOWS}
    for seed in SEEDS:
        for (n, way), lr in rates.items():
            table.get(n, way, lr, seed, split="test")


if __name__ == "__main__":
    main()
