"""Lesson 08: PaFi's own choice, the smallest entries of campus-nano with the embedding left out, over ten seeds.

    python data/lessons/08/smallest_inside.py        goes on where it was stopped

All is as in random_inside.py but what chooses: the smallest entries in size, where that table has random ones, and as
many. So the three rules of lesson 08 stand over seeds in one and the same place.

Lesson 08 reads the table, smallest_inside.jsonl.
"""

import copy

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores
from pefttutor.parts import entries
from pefttutor.parts.ranking import largest

MODEL, HEAD, STEPS, BATCH = "campus-nano", ("score",), 120, 16
WINDOWS = {("verdicts", 64): (5e-2, 2e-1), ("animals", 256): (1e-1, 5e-1)}


def masks(model):
    """Booleans for every tensor but the head's and the embedding's, as many true as there are biases."""
    tensors = {name: p for name, p in entries.candidates(model, HEAD).items() if "embed" not in name}
    k = sum(p.numel() for name, p in tensors.items() if name.endswith("bias"))
    return largest({name: -p.detach().abs() for name, p in tensors.items()}, k)


def train(task, n, way, lr, seed):
    """Adapt campus-nano to the n examples of a seed by these entries and the head; what `scores` says of it."""
    model, examples = copy.deepcopy(prepared(MODEL, task)[0]), drawn(MODEL, task, n, seed)
    pefttutor.SparseFineTuning(modules_to_save=HEAD).attach(model, masks(model))
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return scores(model, MODEL, task)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*case, "smallest inside"): window for case, window in WINDOWS.items()},
        columns=("task", "n", "way"),
        rates=[1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0],
        seeds=range(10),
        search_seeds=range(100, 105),
        model=MODEL,
        tasks=[task for task, _ in WINDOWS],
        steps=STEPS,
        batch_size=BATCH,
    )
