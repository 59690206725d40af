"""Lesson 08: rules that choose what trains, on 16 to 256 examples of two tasks, over ten seeds.

    python data/lessons/08/compare_sizes.py        goes on where it was stopped

Every way trains campus-nano for 120 steps of 16, and the head; but for the frozen model with a head that is fitted to
its end. A seed draws the examples and their order. Learning rates lie on 1, 2, 5, 10, …: five other seeds try a way's
first window at each size, widened as long as the best mean accuracy on the validation split lies at its edge.

Lesson 08 reads the table, compare_sizes.jsonl, and beside it compare_masks.jsonl of lesson 09, where head, biases,
the smallest and random entries and full fine-tuning stand for 64 verdicts and 256 lists of animals.
"""

import copy

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

MODEL, HEAD, STEPS, BATCH = "campus-nano", ("score",), 120, 16
RULES = {
    "norms": pefttutor.LayerNormTuning(modules_to_save=HEAD),
    "last layer": pefttutor.LastLayers(fraction=0.25, modules_to_save=HEAD),
    "biases": pefttutor.BitFit(modules_to_save=HEAD),
}
SIZES = [("verdicts", 16), ("verdicts", 256), ("animals", 64)]
SIZE_WINDOWS = {"frozen + head": None, "biases": (1e-2, 5e-2), "full": (5e-4, 2e-3)}
MAIN = [("verdicts", 64), ("animals", 256)]
MAIN_WINDOWS = {"norms": (1e-2, 5e-2), "last layer": (1e-3, 5e-3)}


def train(task, n, way, lr, seed):
    """Adapt campus-nano in one way to the n examples of a seed; what `scores` says of it."""
    base, splits = prepared(MODEL, task)
    model, examples = copy.deepcopy(base), drawn(MODEL, task, n, seed)
    if way == "frozen + head":
        pefttutor.fit_head(model, examples, splits["validation"])
        return scores(model, MODEL, task)
    if way in RULES:
        RULES[way].attach(model)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return scores(model, MODEL, task)


if __name__ == "__main__":
    cases = {(*size, way): window for size in SIZES for way, window in SIZE_WINDOWS.items()}
    compare(
        __file__,
        train,
        cases | {(*size, way): window for size in MAIN for way, window in MAIN_WINDOWS.items()},
        columns=("task", "n", "way"),
        rates=[1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0],
        seeds=range(10),
        search_seeds=range(100, 105),
        model=MODEL,
        tasks=["verdicts", "animals"],
        steps=STEPS,
        batch_size=BATCH,
    )
