"""Lesson 11: learned masks at one budget of entries, each at the learning rate that suits it, over ten seeds.

    python data/lessons/11/compare_learned.py        about 20 minutes on a quiet core; goes on where it was stopped

Every sparse way trains the new head and k entries of campus-nano, k = the number of its biases, for STEPS steps in
all: a way with two phases has half of them for each. Marked "twice", it has twice as many, so STEPS for each phase.
Masking learns one bit a weight instead.

A seed draws the training examples, their order and whatever the way draws. A way's learning rate (of its last phase;
first phases take FIRST_LR) is the best by the mean accuracy on the validation split over two other seeds; while the
best is the smallest or largest tried, the next one is tried too.

Lesson 11 reads the table, compare_learned.jsonl, and runs one line again.
"""

import copy

import torch

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared
from pefttutor.parts import entries
from pefttutor.parts.ranking import largest

MODEL, HEAD = "campus-nano", ("score",)
TASK, EXAMPLES = "sentiment", 256
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
WINDOWS = {way: (3e-3, 1e-1) for way in ("frozen + head", *SPARSE)} | {
    "Masking": (3e-3, 3e-2),
    "full": (3e-4, 3e-3),
}
FIRST_LR = 1e-3  # of the phase that trains everything
STEPS, BATCH, REFRESHES = 60, 16, 4


def random_mask(model, k, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = entries.candidates(model, HEAD)
    return largest({n: torch.rand(p.shape, generator=generator) for n, p in tensors.items()}, k)


def trained(way, lr, seed):
    """campus-nano, trained in one way on the examples of a seed."""
    base, examples = prepared(MODEL, TASK)[0], drawn(MODEL, TASK, EXAMPLES, seed)
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
                "FISH": pefttutor.FishMask(
                    fraction=(k + head + 0.5) / (total + head), samples=EXAMPLES, **saved
                ),
                "second order": pefttutor.SecondOrderMask(fraction=fraction, per_tensor=False, **saved),
            }[way]
            method.attach(model, examples)
        fit(2 * STEPS if "twice" in way else STEPS, lr)
    if way in SPARSE and way != "biases":
        assert sum(len(index) for index in entries.entries(model).values()) == k
    return model


def train(way, lr, seed):
    """The accuracies of one run, as shares."""
    model, splits = trained(way, lr, seed), prepared(MODEL, TASK)[1]
    return {name: pefttutor.evaluate(model, splits[name])["accuracy"] for name in ("validation", "test")}


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(way,): window for way, window in WINDOWS.items()},
        columns=("way",),
        rates=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1],
        seeds=range(10),
        search_seeds=[100, 101],
        model=MODEL,
        tasks=[TASK],
        examples=EXAMPLES,
        steps=STEPS,
        batch_size=BATCH,
    )
