"""Lesson 11: learned masks at one budget of entries, each at the learning rate that suits it, over ten seeds.

    python data/lessons/11/compare_learned.py        about 20 minutes on a quiet core; goes on where it was stopped

Every sparse way trains the new head and k entries of campus-nano, k = the number of its biases, for STEPS steps in
all: a way with two phases has half of them for each. Marked "twice", it has twice as many, so STEPS for each phase.
Masking learns one bit a weight instead.

A seed draws the training examples, their order and whatever the way draws. A way's learning rate (of its last phase;
first phases take FIRST_LR) is the best of LEARNING_RATES by the mean accuracy on validation examples over SEARCH_SEEDS,
which are no test seeds; while the best is the smallest or largest tried, the next of GRID is tried too. Writes
learned.json beside this file; its accuracies are shares of the test split. Lesson 11 reads it and runs one row again.
"""

import copy
import hashlib
import inspect
import json
import platform
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

import pefttutor
from pefttutor import data, models
from pefttutor.carriers import root
from pefttutor.files import write_atomically
from pefttutor.selective import entries

MODEL, HEAD = "campus-nano", ("score",)
CASES = [("sentiment", 256)]
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SPARSE = [
    "random",
    "random, twice",
    "biases",
    "FISH",
    "Fish-Dip",
    "second order",
    "Diff-pruning",
    "Diff-pruning, twice",
    "LT-SFT",
    "LT-SFT, twice",
]
WAYS = ["frozen + head", *SPARSE, "Masking", "full"]
LEARNING_RATES = {way: [3e-3, 1e-2, 3e-2, 1e-1] for way in WAYS} | {
    "Masking": [3e-3, 1e-2, 3e-2],
    "full": [3e-4, 1e-3, 3e-3],
}
GRID = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
FIRST_LR = 1e-3  # of the phase that trains everything
SEEDS, SEARCH_SEEDS = list(range(10)), [100, 101]
STEPS, BATCH, REFRESHES = 60, 16, 4
TABLE = Path(__file__).with_name("learned.json")


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def code():
    """What decides a row's number: not the search, nor the words above."""
    functions = (prepared, drawn, random_mask, trained, accuracy)
    return "".join(map(inspect.getsource, functions)) + repr(
        [MODEL, HEAD, MATRICES, FIRST_LR, STEPS, BATCH, REFRESHES]
    )


def provenance():
    """Where the table comes from; rows of another provenance are thrown away."""
    return {
        "command": "python data/lessons/11/compare_learned.py",
        "code_sha256": sha256(code().encode()),
        "model": MODEL,
        "model_sha256": sha256((root() / "models" / MODEL / "model.safetensors").read_bytes()),
        "tasks": {
            task: json.loads((root() / "tasks" / task / "task.json").read_text())["fingerprint"]
            for task, _ in CASES
        },
        "seeds": SEEDS,
        "search_seeds": SEARCH_SEEDS,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "pefttutor": version("pefttutor"),
        },
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


def random_mask(model, k, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = entries.candidates(model, HEAD)
    return entries.largest({n: torch.rand(p.shape, generator=generator) for n, p in tensors.items()}, k)


def trained(way, task, n, lr, seed):
    """campus-nano, trained in one way on the n examples of a seed."""
    base, examples = prepared(task)[0], drawn(task, n, seed)
    model, saved = copy.deepcopy(base), {"modules_to_save": HEAD}
    sizes = {name: p.numel() for name, p in entries.candidates(model, HEAD).items()}
    k, total = sum(size for name, size in sizes.items() if name.endswith("bias")), sum(sizes.values())
    fraction, half = (k + 0.5) / total, STEPS if "twice" in way else STEPS // 2

    def fit(steps, lr):
        pefttutor.fit(model, examples, steps=steps, batch_size=BATCH, lr=lr, seed=seed)

    if way.startswith("LT-SFT"):
        method = pefttutor.LTSFT(fraction=fraction, **saved)
        method.attach(model)
        fit(half, FIRST_LR)
        method.rewind(model)
        fit(half, lr)
    elif way.startswith("Diff-pruning"):
        method = pefttutor.DiffPruning(**saved)
        method.attach(model)
        fit(half, FIRST_LR)
        method.project(model, fraction=fraction)
        fit(half, lr)
    elif way == "Fish-Dip":
        method = pefttutor.FishDip(fraction=fraction, **saved)
        method.attach(model, examples)
        for part in range(REFRESHES):
            if part:
                method.refresh(model, examples)
            fit(STEPS // REFRESHES, lr)
    else:
        if way == "full":
            model.requires_grad_(True)
        elif way.startswith("random"):
            pefttutor.SparseFineTuning(**saved).attach(model, random_mask(model, k, seed))
        elif way in ("frozen + head", "biases", "Masking"):
            method = {
                "frozen + head": pefttutor.LinearProbe(**saved),
                "biases": pefttutor.BitFit(**saved),
                "Masking": pefttutor.Masking(target_modules=MATRICES, init_seed=seed, **saved),
            }[way]
            method.attach(model)
        else:
            head = sum(p.numel() for p in model.parameters()) - total
            method = {
                "FISH": pefttutor.FishMask(fraction=(k + head + 0.5) / (total + head), samples=n, **saved),
                "second order": pefttutor.SecondOrderMask(fraction=fraction, per_tensor=False, **saved),
            }[way]
            method.attach(model, examples)
        fit(2 * STEPS if "twice" in way else STEPS, lr)
    if way in SPARSE and way != "biases":
        assert sum(len(index) for index in entries.entries(model).values()) == k
    return model


def accuracy(way, task, n, lr, seed, split):
    return pefttutor.evaluate(trained(way, task, n, lr, seed), prepared(task)[1][split])["accuracy"]


def best_lr(run, way, task, n):
    """The learning rate with the best mean on validation; the smaller one if two are equal."""
    tried = [GRID.index(lr) for lr in LEARNING_RATES[way]]
    while True:
        means = {
            i: sum(run("validation", task, n, way, GRID[i], seed) for seed in SEARCH_SEEDS) for i in tried
        }
        best = max(tried, key=lambda i: (means[i], -i))
        wider = {min(tried): min(tried) - 1, max(tried): max(tried) + 1}.get(best)
        if wider is None or wider not in range(len(GRID)):
            return GRID[best]
        tried.append(wider)


def main():
    torch.set_num_threads(1)
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if table.get("provenance") != provenance():
        table = {"provenance": provenance(), "learning_rates": {}, "rows": {}}
    rows = table["rows"]

    def run(split, task, n, way, lr, seed):
        key = f"{split} {task} {n} {way} {lr} {seed}"
        if key not in rows:
            rows[key] = round(accuracy(way, task, n, lr, seed, split), 6)
            write_atomically(TABLE, json.dumps(table, indent=1) + "\n")
            print(key, rows[key], file=sys.stderr, flush=True)
        return rows[key]

    for task, n in CASES:
        for way in WAYS:
            lr = table["learning_rates"][f"{task} {n} {way}"] = best_lr(run, way, task, n)
            for seed in SEEDS:
                run("test", task, n, way, lr, seed)
    write_atomically(TABLE, json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
