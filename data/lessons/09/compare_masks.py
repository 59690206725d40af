"""Lesson 09: six ways to choose 5,376 entries of campus-nano, each at its own learning rate, over ten seeds.

    python data/lessons/09/compare_masks.py        half an hour on one quiet core; goes on where it was stopped

Every way trains the new head and as many entries as the model has biases. A seed draws the training examples, their
order and what the way draws. Learning rates lie on 1, 2, 5, 10, …: the first five seeds try a way's first window, which
is widened as long as the best mean accuracy on the validation split lies at its edge; then all ten run the best one.

Writes masks.jsonl beside this file: in the first line where the table comes from, then one run a line, with its
accuracies on the validation and the test split. Lesson 09 reads it and runs one line again.
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
from pefttutor.selective import entries
from pefttutor.selective.information import fisher_information

MODEL, HEAD = "campus-nano", ("score",)
CASES = [("sentiment", 64, 100), ("topic", 64, 100), ("sentiment", 64, 30)]  # task, examples, steps
GRID = [1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0]
WINDOWS = {
    "FISH": (2e-3, 1e-2),
    "FISH's tensors": (5e-3, 2e-2),
    "random": (2e-2, 1e-1),
    "smallest": (2e-2, 1e-1),
    "largest": (2e-2, 1e-1),
    "biases": (5e-3, 2e-2),
    "head alone": (1e-2, 5e-2),
    "full": (5e-4, 2e-3),
}
SEEDS, SEARCH_SEEDS, BATCH = list(range(10)), list(range(5)), 16
TABLE = Path(__file__).with_name("masks.jsonl")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def provenance():
    """Where the table comes from; rows of another provenance are thrown away."""
    tasks = {task: root() / "tasks" / task / "task.json" for task, _, _ in CASES}
    return {
        "command": "python data/lessons/09/compare_masks.py",
        "script_sha256": sha256(Path(__file__)),
        "model": MODEL,
        "model_sha256": sha256(root() / "models" / MODEL / "model.safetensors"),
        "tasks": {task: json.loads(path.read_text())["fingerprint"] for task, path in tasks.items()},
        "seeds": SEEDS,
        "search_seeds": SEARCH_SEEDS,
        "batch_size": BATCH,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "pefttutor")},
    }


@cache
def prepared(task):
    """The base with its new head, and the encoded splits."""
    model, words = models.load(MODEL, head="classification", labels=list(data.info(task).labels))
    return model, {name: data.encode(split, words) for name, split in data.load(task).items()}


@cache
def drawn(task, n, seed):
    examples = prepared(task)[1]["train"]
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    return [examples[i] for i in order[:n].tolist()]


@cache
def masks(way, task, n, seed):
    """Booleans for every tensor but the head's, as many true as there are biases."""
    model, examples = prepared(task)[0], drawn(task, n, seed)
    tensors = {name: p.detach() for name, p in entries.candidates(model, HEAD).items()}
    generator = torch.Generator().manual_seed(seed)
    biases = {name: torch.full(p.shape, name.endswith("bias")) for name, p in tensors.items()}
    if way == "biases":
        return biases
    if way == "FISH's tensors":  # as many entries in each tensor as FISH chooses, at random places
        found = masks("FISH", task, n, seed)
        return {
            name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view(mask.shape)
            for name, mask in found.items()
        }
    scores = {
        "FISH": lambda: fisher_information(model, examples),
        "random": lambda: {name: torch.rand(p.shape, generator=generator) for name, p in tensors.items()},
        "smallest": lambda: {name: -p.abs() for name, p in tensors.items()},
        "largest": lambda: {name: p.abs() for name, p in tensors.items()},
    }[way]()
    return entries.largest(
        {name: scores[name] for name in tensors}, sum(int(m.sum()) for m in biases.values())
    )


def run(task, n, steps, way, lr, seed):
    """Train campus-nano in one way on the n examples of a seed; the accuracies, as shares."""
    base, splits = prepared(task)
    model = copy.deepcopy(base)
    if way == "head alone":
        pefttutor.LinearProbe(modules_to_save=HEAD).attach(model)
    elif way != "full":
        pefttutor.SparseFineTuning(modules_to_save=HEAD).attach(model, masks(way, task, n, seed))
    pefttutor.fit(model, drawn(task, n, seed), steps=steps, batch_size=BATCH, lr=lr, seed=seed)
    return {name: pefttutor.evaluate(model, splits[name])["accuracy"] for name in ("validation", "test")}


class Table:
    """The runs so far, each in a line of the file as soon as it is done."""

    columns = ("task", "n", "steps", "way", "lr", "seed")

    def __init__(self):
        lines = TABLE.read_text().splitlines() if TABLE.exists() else []
        fits = bool(lines) and json.loads(lines[0]) == provenance()
        self.lines = lines if fits else [json.dumps(provenance())]
        rows = [json.loads(line) for line in self.lines[1:]]
        self.rows = {tuple(row[name] for name in self.columns): row for row in rows}

    def __getitem__(self, key):
        if key not in self.rows:
            accuracies = {name: round(value, 6) for name, value in run(*key).items()}
            self.rows[key] = dict(zip(self.columns, key, strict=True)) | accuracies
            self.lines.append(json.dumps(self.rows[key]))
            write_atomically(TABLE, "\n".join(self.lines) + "\n")
            print(self.lines[-1], file=sys.stderr, flush=True)
        return self.rows[key]


def best(table, case, way, lrs):
    """The learning rate with the best mean on validation; the smaller one if two are equal."""
    return max(lrs, key=lambda lr: sum(table[*case, way, lr, seed]["validation"] for seed in SEARCH_SEEDS))


def main():
    torch.set_num_threads(1)
    table = Table()
    for case in CASES:
        for way, (low, high) in WINDOWS.items():
            first, last = GRID.index(low), GRID.index(high)
            while True:
                chosen = GRID.index(best(table, case, way, GRID[first : last + 1]))
                if chosen == first > 0:
                    first -= 1
                elif chosen == last < len(GRID) - 1:
                    last += 1
                else:
                    break
            for seed in SEEDS:
                table[*case, way, GRID[chosen], seed]


if __name__ == "__main__":
    main()
