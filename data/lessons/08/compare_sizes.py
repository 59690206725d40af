"""Lesson 08: the head alone, BitFit and full fine-tuning of campus-nano on 16 to 1000 reviews, over ten seeds.

    python data/lessons/08/compare_sizes.py        about ten minutes on one quiet core; goes on where it was stopped

A seed draws the reviews and their order. Each way gets its learning rate for each size by the mean accuracy of two
other seeds on the validation split; the window of three rates is widened while the best lies at its edge.

Lesson 08 reads the table, compare_sizes.jsonl.
"""

import copy

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared

MODEL, TASK, HEAD, BATCH = "campus-nano", "sentiment", ("score",), 16
SIZES = [16, 64, 256, 1000]
WINDOWS = {"frozen + head": (1e-2, 1e-1), "BitFit": (3e-3, 3e-2), "full": (3e-4, 3e-3)}


def steps(n):
    """60, or two passes over the reviews where that is more."""
    return max(60, 2 * -(-n // BATCH))


def train(n, way, lr, seed):
    """Train campus-nano in one way on the n reviews of a seed; the accuracies, as shares."""
    base, splits = prepared(MODEL, TASK)
    model = copy.deepcopy(base)
    if way != "full":
        rule = pefttutor.LinearProbe if way == "frozen + head" else pefttutor.BitFit
        rule(modules_to_save=HEAD).attach(model)
    pefttutor.fit(model, drawn(MODEL, TASK, n, seed), steps=steps(n), batch_size=BATCH, lr=lr, seed=seed)
    return {name: pefttutor.evaluate(model, splits[name])["accuracy"] for name in ("validation", "test")}


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(n, way): window for n in SIZES for way, window in WINDOWS.items()},
        columns=("n", "way"),
        rates=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0],
        seeds=range(10),
        search_seeds=[100, 101],
        model=MODEL,
        tasks=[TASK],
        steps={str(n): steps(n) for n in SIZES},
        batch_size=BATCH,
    )
