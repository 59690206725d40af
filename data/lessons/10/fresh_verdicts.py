"""Lesson 10: full fine-tuning, F and D on verdicts again, over eighty seeds that chose nothing and are new.

    python data/lessons/10/fresh_verdicts.py        goes on where it was stopped

Ten seeds couldn't tell a difference of 1.5 points from full fine-tuning; by their spread that takes up to 79 of them on
verdicts, and 44 on animals (fresh_animals.py). Each way trains as in compare_child.py, and as in compare_masks.py of
lesson 09, at the learning rate that was chosen there. Lesson 10 reads the table, fresh_verdicts.jsonl.
"""

import copy

import pefttutor
from pefttutor.authoring.tables import best, compare, drawn, prepared, read, scores

MODEL, TASK, N, P, STEPS, BATCH = "campus-nano", "verdicts", 64, 0.3, 120, 16


def adapted(task, n, way, rate, seed):
    """What `scores` says of campus-nano, adapted in one way to the n examples of a seed."""
    model, examples = copy.deepcopy(prepared(MODEL, task)[0]), drawn(MODEL, task, n, seed)
    if way == "F":
        pefttutor.ChildTuningF(p_F=P, seed=seed).attach(model)
    if way == "D":
        pefttutor.ChildTuningD(p_D=P, modules_to_save=("score",)).attach(model, examples)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=rate, seed=seed)
    return scores(model, MODEL, task)


def train(way, rate, _, seed):
    """`adapted` to verdicts."""
    return adapted(TASK, N, way, rate, seed)


def compare_fresh(script, train, task, n, seeds):
    """Each way over these seeds, at the rate of the two tables that searched for it."""
    chosen = best(*read("09/compare_masks.jsonl")) | best(*read("10/compare_child.jsonl"))
    compare(
        script,
        train,
        {(way, chosen[task, n, way][0]["lr"]): None for way in ("full", "F", "D")},
        columns=("way", "rate"),
        rates=[],
        seeds=seeds,
        search_seeds=[],
        model=MODEL,
        tasks=[task],
        steps=STEPS,
        batch_size=BATCH,
        p=P,
    )


if __name__ == "__main__":
    compare_fresh(__file__, train, TASK, N, range(10, 90))
