"""Lesson 10: Child-Tuning F and D, a random child and full fine-tuning on few examples, over ten seeds.

    python data/lessons/10/compare_child.py        about 20 minutes on one quiet core; goes on where it was stopped

Every way trains campus-nano for 60 steps. D and the random child train 30 % of the entries, the same in all steps, and
the new head; F keeps 30 % of the gradient in each step. A seed draws the training examples, their order and what the
way draws. Learning rates lie on 1, 2, 5, 10, …: a way's first window is tried by all ten seeds, and widened as long as
the best mean accuracy on the validation split lies at its edge.

Writes child.jsonl beside this file: in the first line where the table comes from, then one run a line, with its
accuracies on the validation and the test split. Lesson 10 reads it and runs one line again.
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

MODEL, HEAD, P = "campus-nano", ("score",), 0.3
CASES = [("sentiment", 64), ("topic", 256)]
GRID = [1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2]
WINDOWS = {"full": (5e-4, 2e-3), "F": (5e-4, 2e-3), "D": (5e-4, 2e-3), "random child": (5e-4, 2e-3)}
SEEDS, STEPS, BATCH = list(range(10)), 60, 16
TABLE = Path(__file__).with_name("child.jsonl")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def provenance():
    """Where the table comes from; rows of another provenance are thrown away."""
    tasks = {task: root() / "tasks" / task / "task.json" for task, _ in CASES}
    return {
        "command": "python data/lessons/10/compare_child.py",
        "script_sha256": sha256(Path(__file__)),
        "model": MODEL,
        "model_sha256": sha256(root() / "models" / MODEL / "model.safetensors"),
        "tasks": {task: json.loads(path.read_text())["fingerprint"] for task, path in tasks.items()},
        "seeds": SEEDS,
        "steps": STEPS,
        "batch_size": BATCH,
        "p": P,
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
    """Booleans for every tensor but the head's: by the Fisher information of the n examples, or at random."""
    model = prepared(task)[0]
    if way == "D":
        return pefttutor.ChildTuningD(p_D=P, modules_to_save=HEAD).masks(model, drawn(task, n, seed))
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.rand(p.shape, generator=generator) for name, p in entries.candidates(model, HEAD).items()
    }
    return entries.largest(scores, int(P * sum(score.numel() for score in scores.values())))


def run(task, n, way, lr, seed):
    """Train campus-nano in one way on the n examples of a seed; the accuracies, as shares."""
    base, splits = prepared(task)
    model = copy.deepcopy(base)
    if way == "F":
        pefttutor.ChildTuningF(p_F=P, seed=seed).attach(model)
    elif way != "full":
        pefttutor.SparseFineTuning(modules_to_save=HEAD).attach(model, masks(way, task, n, seed))
    pefttutor.fit(model, drawn(task, n, seed), steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return {name: pefttutor.evaluate(model, splits[name])["accuracy"] for name in ("validation", "test")}


def best(rows, task, n, way, lrs):
    """The learning rate with the best mean on validation; the smaller one if two are equal."""
    sums = {lr: sum(rows[task, n, way, lr, seed]["validation"] for seed in SEEDS) for lr in lrs}
    return max(lrs, key=lambda lr: sums[lr])


def stored():
    """The runs in the table, if they have today's provenance."""
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    if not lines or json.loads(lines[0]) != provenance():
        return {}
    rows = [json.loads(line) for line in lines[1:]]
    return {(row["task"], row["n"], row["way"], row["lr"], row["seed"]): row for row in rows}


def main():
    torch.set_num_threads(1)
    rows, header = stored(), provenance()
    for task, n in CASES:
        for way, (low, high) in WINDOWS.items():
            first, last = GRID.index(low), GRID.index(high)
            while True:
                lrs = GRID[first : last + 1]
                for key in [(task, n, way, lr, seed) for lr in lrs for seed in SEEDS]:
                    if key not in rows:
                        named = dict(zip(("task", "n", "way", "lr", "seed"), key, strict=True))
                        rows[key] = named | {name: round(v, 6) for name, v in run(*key).items()}
                        lines = [json.dumps(line) for line in (header, *rows.values())]
                        write_atomically(TABLE, "\n".join(lines) + "\n")
                        print(lines[-1], file=sys.stderr, flush=True)
                chosen = best(rows, task, n, way, lrs)
                if chosen == lrs[0] and first > 0:
                    first -= 1
                elif chosen == lrs[-1] and last < len(GRID) - 1:
                    last += 1
                else:
                    break


if __name__ == "__main__":
    main()
