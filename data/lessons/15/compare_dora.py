"""Lesson 15: DoRA of rank 8 on few examples of two tasks, over ten seeds.

    python data/lessons/15/compare_dora.py        goes on where it was stopped

DoRA adapts q_proj and v_proj of campus-nano with the factor α/r = 2, and trains the new head, for 120 steps of 16, as
LoRA does in compare_ranks.py of lesson 12. A seed draws the examples, their order and the factors A. Learning rates lie
on 1, 2, 5, 10, …: five other seeds try 0.005, 0.01 and 0.02, and more as long as the best mean accuracy on the
validation split lies at an edge.

Lesson 15 reads the table, compare_dora.jsonl.
"""

import copy

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

MODEL, HEAD, STEPS, BATCH = "campus-nano", ("score",), 120, 16
CASES, WINDOW = [("verdicts", 64), ("animals", 256)], (5e-3, 2e-2)


def train(task, n, way, lr, seed):
    """Adapt campus-nano to the n examples of a seed; what `scores` says of it."""
    model = copy.deepcopy(prepared(MODEL, task)[0])
    pefttutor.DoRA(r=8, lora_alpha=16, init_seed=seed, modules_to_save=HEAD).attach(model)
    examples = drawn(MODEL, task, n, seed)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return scores(model, MODEL, task)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*case, "DoRA"): WINDOW for case in CASES},
        columns=("task", "n", "way"),
        rates=[1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1],
        seeds=range(10),
        search_seeds=range(100, 105),
        model=MODEL,
        tasks=[task for task, _ in CASES],
        steps=STEPS,
        batch_size=BATCH,
    )
