"""Lesson 05: beside the feed-forward instead of after it, and with norms that train, on the budget of the first table.

    python data/lessons/05/compare_variants.py        after compare_placements.py; goes on where it was stopped

Tasks, examples, steps, seeds, budget and search are those of compare_placements.py, which has the adapters after their
sublayers. The norms' 1,152 values are paid for with one feature of each bottleneck. Lesson 05 reads the table,
compare_variants.jsonl.
"""

import copy
import runpy
from pathlib import Path

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

FIRST = runpy.run_path(str(Path(__file__).with_name("compare_placements.py")))
MODEL, HEAD, STEPS, BATCH, BUDGET, CASES, WINDOW, SEARCH = (
    FIRST[name] for name in ("MODEL", "HEAD", "STEPS", "BATCH", "BUDGET", "CASES", "WINDOW", "SEARCH")
)
WAYS = {
    "parallel": {"placement": "parallel", "bottleneck": 15},
    "houlsby + norms": {"placement": "houlsby", "bottleneck": 6, "train_norms": True},
}


def train(task, n, way, lr, seed):
    """Adapt campus-nano in one way to the n examples of a seed; what `scores` says of it."""
    base, splits = prepared(MODEL, task)
    method = pefttutor.Adapter(**WAYS[way], init_seed=seed)
    assert method.count(base) <= BUDGET
    method = pefttutor.Adapter(**WAYS[way], init_seed=seed, modules_to_save=HEAD)
    model, examples = method.attach(copy.deepcopy(base)), drawn(MODEL, task, n, seed)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    if seed in SEARCH:  # the search looks at nothing else
        return {"validation": pefttutor.evaluate(model, splits["validation"])["accuracy"]}
    return scores(model, MODEL, task)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*case, way): WINDOW for case in CASES for way in WAYS},
        columns=("task", "n", "way"),
        rates=[1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1],
        seeds=range(10),
        search_seeds=SEARCH,
        model=MODEL,
        tasks=[task for task, _ in CASES],
        steps=STEPS,
        batch_size=BATCH,
    )
