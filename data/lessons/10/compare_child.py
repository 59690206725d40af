"""Lesson 10: Child-Tuning F and D, a random child and full fine-tuning on few examples, over ten seeds.

    python data/lessons/10/compare_child.py        about ten minutes on one quiet core; goes on where it was stopped

Every way trains campus-nano for 60 steps. D and the random child train 30 % of the entries, the same in all steps, and
the new head; F keeps 30 % of the gradient in each step. A seed draws the training examples, their order and what the
way draws. Learning rates lie on 1, 2, 5, 10, …: a way's first window is tried by all ten seeds, and widened as long as
the best mean accuracy on the validation split lies at its edge.

Lesson 10 reads the table, compare_child.jsonl, and runs one line again.
"""

import copy
from functools import cache

import torch

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared
from pefttutor.parts import entries
from pefttutor.parts.ranking import largest

MODEL, HEAD, P, STEPS, BATCH = "campus-nano", ("score",), 0.3, 60, 16
CASES = [("sentiment", 64), ("topic", 256)]


@cache
def masks(way, task, n, seed):
    """Booleans for every tensor but the head's: by the Fisher information of the n examples, or at random."""
    model = prepared(MODEL, task)[0]
    if way == "D":
        return pefttutor.ChildTuningD(p_D=P, modules_to_save=HEAD).masks(model, drawn(MODEL, task, n, seed))
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.rand(p.shape, generator=generator) for name, p in entries.candidates(model, HEAD).items()
    }
    return largest(scores, int(P * sum(score.numel() for score in scores.values())))


def train(task, n, way, lr, seed):
    """Train campus-nano in one way on the n examples of a seed; the accuracies, as shares."""
    base, splits = prepared(MODEL, task)
    model = copy.deepcopy(base)
    if way == "F":
        pefttutor.ChildTuningF(p_F=P, seed=seed).attach(model)
    elif way != "full":
        pefttutor.SparseFineTuning(modules_to_save=HEAD).attach(model, masks(way, task, n, seed))
    pefttutor.fit(model, drawn(MODEL, task, n, seed), steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return {name: pefttutor.evaluate(model, splits[name])["accuracy"] for name in ("validation", "test")}


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*case, way): (5e-4, 2e-3) for case in CASES for way in ("full", "F", "D", "random child")},
        columns=("task", "n", "way"),
        rates=[1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2],
        seeds=range(10),
        search_seeds=range(10),
        model=MODEL,
        tasks=["sentiment", "topic"],
        steps=STEPS,
        batch_size=BATCH,
        p=P,
    )
