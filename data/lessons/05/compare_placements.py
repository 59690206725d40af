"""Lesson 05: bottleneck adapters in eight places or, twice as wide, in four, over ten seeds of two tasks.

    python data/lessons/05/compare_placements.py        goes on where it was stopped

The budget is what LoRA of rank 8 trains in lesson 12: 16,384 values and the new head. Each way has the widest
bottleneck that it can pay for. It trains campus-nano for 120 steps of 16. A seed draws the examples, their order and
the weights W_d; W_u starts at zero. Learning rates lie on 1, 2, 5, 10, …: five other seeds try a way's first window,
which is widened as long as the best mean accuracy on the validation split lies at its edge.

Lesson 05 reads the table, compare_placements.jsonl. LoRA on the same examples stands in compare_ranks.jsonl of lesson
12, full fine-tuning and the frozen model with a converged head in compare_masks.jsonl of lesson 09.
"""

import copy

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

MODEL, HEAD, STEPS, BATCH, BUDGET = "campus-nano", ("score",), 120, 16, 16_384
CASES, WINDOW, SEARCH = [("verdicts", 64), ("animals", 256)], (5e-3, 2e-2), range(100, 105)
WAYS = {
    "houlsby": {"placement": "houlsby", "bottleneck": 7},
    "pfeiffer": {"placement": "pfeiffer", "bottleneck": 15},
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
