"""Lesson 11: learned masks at one budget of entries, each phase at the learning rate that suits it, over ten seeds.

    python data/lessons/11/compare_learned.py        goes on where it was stopped

Every sparse way trains the new head and k entries of campus-nano, k = the number of its biases, for STEPS steps of 16
in all: a way with two phases has half of them for each. Marked "twice", it has twice as many, so STEPS for each
phase. Masking learns one bit a weight instead. The yardsticks are full fine-tuning and the frozen model with a head
that is fitted to its end.

A seed draws the training examples, their order and whatever the way draws. Learning rates lie on 1, 3, 10, …: five
other seeds try a way's first window (of two phases: all pairs), which is widened as long as the best mean accuracy on
the validation split lies at its edge.

Lesson 11 reads the table, compare_learned.jsonl, and runs one line again.
"""

import copy

import torch

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores
from pefttutor.parts import entries
from pefttutor.parts.ranking import largest

MODEL, HEAD, STEPS, BATCH, REFRESHES = "campus-nano", ("score",), 120, 16, 4
CASES = [("verdicts", 64), ("animals", 256)]  # task, examples
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ONE, TWO = (None, (1e-2, 1e-1)), ((3e-4, 3e-3), (3e-3, 3e-2))  # windows of the phases
WINDOWS = {
    "frozen + head": None,
    "random": ONE,
    "random, twice": ONE,
    "FISH": (None, (3e-3, 3e-2)),
    "Fish-Dip": (None, (3e-3, 3e-2)),
    "second order": (None, (3e-3, 3e-2)),
    "Diff-pruning": TWO,
    "Diff-pruning, twice": TWO,
    "LT-SFT": TWO,
    "LT-SFT, twice": TWO,
    "Masking": (None, (3e-3, 3e-2)),
    "full": (None, (3e-4, 3e-3)),
}


def random_mask(model, k, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = entries.candidates(model, HEAD)
    return largest({n: torch.rand(p.shape, generator=generator) for n, p in tensors.items()}, k)


def trained(task, n, way, first_lr, lr, seed):
    """campus-nano, trained in one way on the n examples of a seed."""
    base, splits = prepared(MODEL, task)
    model, examples, saved = copy.deepcopy(base), drawn(MODEL, task, n, seed), {"modules_to_save": HEAD}
    sizes = {name: p.numel() for name, p in entries.candidates(model, HEAD).items()}
    k, total = sum(size for name, size in sizes.items() if name.endswith("bias")), sum(sizes.values())
    fraction, steps = (k + 0.5) / total, 2 * STEPS if "twice" in way else STEPS

    def fit(steps, lr):
        pefttutor.fit(model, examples, steps=steps, batch_size=BATCH, lr=lr, seed=seed)

    if way == "frozen + head":
        pefttutor.fit_head(model, examples, splits["validation"])
        return model
    if way.startswith("LT-SFT"):
        method = pefttutor.LTSFT(fraction=fraction, **saved)
        method.attach(model)
        fit(steps // 2, first_lr)
        method.rewind(model)
        fit(steps // 2, lr)
    elif way.startswith("Diff-pruning"):
        method = pefttutor.DiffPruning(**saved)
        method.attach(model)
        fit(steps // 2, first_lr)
        method.project(model, fraction=fraction)
        fit(steps // 2, lr)
    elif way == "Fish-Dip":
        method = pefttutor.FishDip(fraction=fraction, **saved)
        method.attach(model, examples)
        for part in range(REFRESHES):
            if part:
                method.refresh(model, examples)
            fit(steps // REFRESHES, lr)
    else:
        attach(model, way, k, total, examples, seed)
        fit(steps, lr)
    if way not in ("full", "Masking"):
        assert sum(len(index) for index in entries.entries(model).values()) == k
    return model


def attach(model, way, k, total, examples, seed):
    """Ways of one phase, whose choice stands before it."""
    saved, head = {"modules_to_save": HEAD}, sum(p.numel() for p in model.parameters()) - total
    if way.startswith("random"):
        pefttutor.SparseFineTuning(**saved).attach(model, random_mask(model, k, seed))
    elif way == "Masking":
        pefttutor.Masking(target_modules=MATRICES, init_seed=seed, **saved).attach(model)
    elif way == "FISH":
        fraction = (k + head + 0.5) / (total + head)
        pefttutor.FishMask(fraction=fraction, samples=len(examples), **saved).attach(model, examples)
    elif way == "second order":
        method = pefttutor.SecondOrderMask(fraction=(k + 0.5) / total, per_tensor=False, **saved)
        method.attach(model, examples)


def train(task, n, way, first_lr, lr, seed):
    """What `scores` says of one run."""
    return scores(trained(task, n, way, first_lr, lr, seed), MODEL, task)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*case, way): windows for case in CASES for way, windows in WINDOWS.items()},
        columns=("task", "n", "way"),
        phases=("first_lr", "lr"),
        rates=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0],
        seeds=range(10),
        search_seeds=range(100, 105),
        model=MODEL,
        tasks=[task for task, _ in CASES],
        steps=STEPS,
        batch_size=BATCH,
    )
