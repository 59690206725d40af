"""Lesson 09: six ways to choose 5,376 entries of campus-nano, each at its own learning rate, over ten seeds.

    python data/lessons/09/compare_masks.py        goes on where it was stopped

Every way trains the new head and as many entries as the model has biases, for 120 steps of 16. The yardsticks are
full fine-tuning and the frozen model with a head that is fitted to its end. A seed draws the training examples, their
order and what the way draws. Learning rates lie on 1, 2, 5, 10, …: five other seeds try a way's first window, which
is widened as long as the best mean accuracy on the validation split lies at its edge.

Lesson 09 reads the table, compare_masks.jsonl, and runs one line again.
"""

import copy
from functools import cache

import torch

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores
from pefttutor.parts import entries
from pefttutor.parts.information import fisher_information
from pefttutor.parts.ranking import largest

MODEL, HEAD, STEPS, BATCH = "campus-nano", ("score",), 120, 16
CASES = [("verdicts", 64), ("animals", 256)]  # task, examples
WINDOWS = {
    "FISH": (5e-3, 2e-2),
    "FISH's tensors": (1e-2, 5e-2),
    "random": (2e-2, 1e-1),
    "smallest": (2e-2, 1e-1),
    "largest": (2e-2, 1e-1),
    "biases": (1e-2, 5e-2),
    "frozen + head": None,
    "full": (5e-4, 2e-3),
}


@cache
def masks(way, task, n, seed):
    """Booleans for every tensor but the head's, as many true as there are biases."""
    model, examples = prepared(MODEL, task)[0], drawn(MODEL, task, n, seed)
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
    values = {
        "FISH": lambda: fisher_information(model, examples),
        "random": lambda: {name: torch.rand(p.shape, generator=generator) for name, p in tensors.items()},
        "smallest": lambda: {name: -p.abs() for name, p in tensors.items()},
        "largest": lambda: {name: p.abs() for name, p in tensors.items()},
    }[way]()
    return largest({name: values[name] for name in tensors}, sum(int(m.sum()) for m in biases.values()))


def train(task, n, way, lr, seed):
    """Adapt campus-nano in one way to the n examples of a seed; what `scores` says of it."""
    base, splits = prepared(MODEL, task)
    model, examples = copy.deepcopy(base), drawn(MODEL, task, n, seed)
    if way == "frozen + head":
        pefttutor.fit_head(model, examples, splits["validation"])
        return scores(model, MODEL, task)
    if way != "full":
        pefttutor.SparseFineTuning(modules_to_save=HEAD).attach(model, masks(way, task, n, seed))
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return scores(model, MODEL, task)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*case, way): window for case in CASES for way, window in WINDOWS.items()},
        columns=("task", "n", "way"),
        rates=[1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0],
        seeds=range(10),
        search_seeds=range(100, 105),
        model=MODEL,
        tasks=[task for task, _ in CASES],
        steps=STEPS,
        batch_size=BATCH,
    )
