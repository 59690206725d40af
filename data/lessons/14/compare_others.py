"""Lesson 14: three more ways to let ranks move, on few examples of two tasks, over ten seeds.

    python data/lessons/14/compare_others.py        goes on where it was stopped

As compare_adalora.py: q_proj and v_proj, s = 2, a new head, 120 steps of 16. SoRA begins with 12 directions a layer,
and the pull on its gates is such that about 8 were left where it was tried, on seed 100. IncreLoRA grows from 1 to
8 triplets a layer on average, by four every five steps; like AdaLoRA it has γ = 0.1. DyLoRA has 8 directions, of which
each step trains as many as it draws; the columns rank_1, rank_2 and rank_4 are its test accuracy with so many.

Lesson 14 reads the table, compare_others.jsonl.
"""

import copy
import dataclasses

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

MODEL, HEAD, STEPS, BATCH = "campus-nano", ("score",), 120, 16
CASES = [("verdicts", 64), ("animals", 256)]
WAYS = {
    "SoRA": pefttutor.SoRA(r=12, lora_alpha=24, sparse_lambda_2=4e-3),
    "IncreLoRA": pefttutor.IncreLoRA(target_r=8, lora_alpha=16, incre_interval=5, top_h=4),
    "DyLoRA": pefttutor.DyLoRA(r=8, lora_alpha=16, frozen=False),
}
WINDOWS = {"SoRA": (5e-3, 2e-2), "IncreLoRA": (5e-2, 2e-1), "DyLoRA": (2e-2, 1e-1)}


def train(task, n, way, lr, seed):
    """Adapt campus-nano in one way to the n examples of a seed; what `scores` says of it, and of ranks."""
    base, splits = prepared(MODEL, task)
    model, method = copy.deepcopy(base), dataclasses.replace(WAYS[way], init_seed=seed, modules_to_save=HEAD)
    method.attach(model)
    pefttutor.fit(model, drawn(MODEL, task, n, seed), steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    found = scores(model, MODEL, task)
    if way == "DyLoRA":
        for rank in (1, 2, 4):
            method.use_rank(model, rank)
            found[f"rank_{rank}"] = pefttutor.evaluate(model, splits["test"])["accuracy"]
        return found
    names = [f"{kind}{block}" for block in range(4) for kind in "qv"]
    return found | dict(zip(names, method.ranks(model).values(), strict=True))


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*case, way): WINDOWS[way] for case in CASES for way in WAYS},
        columns=("task", "n", "way"),
        rates=[1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1],
        seeds=range(10),
        search_seeds=range(100, 105),
        model=MODEL,
        tasks=[task for task, _ in CASES],
        steps=STEPS,
        batch_size=BATCH,
    )
