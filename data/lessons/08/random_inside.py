"""Lesson 08: random entries of campus-nano with the embedding left out, over ten seeds.

    python data/lessons/08/random_inside.py        goes on where it was stopped

None of the largest entries lies in the embedding, but a third of the random ones does (compare_masks.py of lesson 09).
Here random entries are chosen where the largest lie, in the blocks and the last norm: as many as the model has biases.
Beside them the new head trains, for 120 steps of 16. A seed draws the training examples, their order and the entries.
Learning rates lie on 1, 2, 5, 10, …: five other seeds try a task's first window, which is widened as long as the best
mean accuracy on the validation split lies at its edge.

Lesson 08 reads the table, random_inside.jsonl, beside those of compare_sizes.py and of lesson 09.
"""

import copy

import torch

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores
from pefttutor.parts import entries
from pefttutor.parts.ranking import largest

MODEL, HEAD, STEPS, BATCH = "campus-nano", ("score",), 120, 16
WINDOWS = {("verdicts", 64): (5e-2, 2e-1), ("animals", 256): (1e-1, 5e-1)}


def masks(model, seed):
    """Booleans for every tensor but the head's and the embedding's, as many true as there are biases."""
    tensors = {name: p for name, p in entries.candidates(model, HEAD).items() if "embed" not in name}
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.rand(p.shape, generator=generator) for name, p in tensors.items()}
    return largest(values, sum(p.numel() for name, p in tensors.items() if name.endswith("bias")))


def train(task, n, way, lr, seed):
    """Adapt campus-nano to the n examples of a seed by random entries and the head; what `scores` says of it."""
    model, examples = copy.deepcopy(prepared(MODEL, task)[0]), drawn(MODEL, task, n, seed)
    pefttutor.SparseFineTuning(modules_to_save=HEAD).attach(model, masks(model, seed))
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return scores(model, MODEL, task)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*case, "random inside"): window for case, window in WINDOWS.items()},
        columns=("task", "n", "way"),
        rates=[1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0],
        seeds=range(10),
        search_seeds=range(100, 105),
        model=MODEL,
        tasks=[task for task, _ in WINDOWS],
        steps=STEPS,
        batch_size=BATCH,
    )
