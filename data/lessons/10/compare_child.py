"""Lesson 10: Child-Tuning F and D, and a random child, on few examples of two tasks, over ten seeds.

    python data/lessons/10/compare_child.py        goes on where it was stopped

Every way trains campus-nano for 120 steps of 16. D and the random child train 30 % of the entries, the same in all
steps, and the new head; F keeps 30 % of the gradient in each step. A seed draws the training examples, their order and
what the way draws. Learning rates lie on 1, 2, 5, 10, …: five other seeds try a way's first window, which is widened as
long as the best mean accuracy on the validation split lies at its edge.

Lesson 10 reads the table, compare_child.jsonl, and runs one line again. Full fine-tuning and the frozen model with a
converged head, on the same examples, stand in compare_masks.jsonl of lesson 09.
"""

import copy
from functools import cache

import torch

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores
from pefttutor.parts import entries
from pefttutor.parts.ranking import largest

MODEL, HEAD, P, STEPS, BATCH = "campus-nano", ("score",), 0.3, 120, 16
CASES = [("verdicts", 64), ("animals", 256)]
WAYS, WINDOW = ("F", "D", "random child"), (5e-4, 2e-3)


@cache
def masks(way, task, n, seed):
    """Booleans for every tensor but the head's: by the Fisher information of the n examples, or at random."""
    model = prepared(MODEL, task)[0]
    if way == "D":
        return pefttutor.ChildTuningD(p_D=P, modules_to_save=HEAD).masks(model, drawn(MODEL, task, n, seed))
    generator = torch.Generator().manual_seed(seed)
    values = {
        name: torch.rand(p.shape, generator=generator) for name, p in entries.candidates(model, HEAD).items()
    }
    return largest(values, int(P * sum(value.numel() for value in values.values())))


def train(task, n, way, lr, seed):
    """Adapt campus-nano in one way to the n examples of a seed; what `scores` says of it."""
    model, examples = copy.deepcopy(prepared(MODEL, task)[0]), drawn(MODEL, task, n, seed)
    if way == "F":
        pefttutor.ChildTuningF(p_F=P, seed=seed).attach(model)
    else:
        pefttutor.SparseFineTuning(modules_to_save=HEAD).attach(model, masks(way, task, n, seed))
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return scores(model, MODEL, task)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*case, way): WINDOW for case in CASES for way in WAYS},
        columns=("task", "n", "way"),
        rates=[1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2],
        seeds=range(10),
        search_seeds=range(100, 105),
        model=MODEL,
        tasks=[task for task, _ in CASES],
        steps=STEPS,
        batch_size=BATCH,
        p=P,
    )
