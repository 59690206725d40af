"""Lesson 14: SoRA on few examples of one task, over ten seeds.

    python data/lessons/14/compare_sora.py        goes on where it was stopped

As compare_adalora.py: q_proj and v_proj of campus-nano, s = 2, a new head, 120 steps of 16. SoRA begins with 12
directions a layer, and the pull on its gates is such that 7 to 8 were left where it was tried, on seed 100.

Lesson 14 reads the table, compare_sora.jsonl.
"""

import copy

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

MODEL, HEAD, STEPS, BATCH = "campus-nano", ("score",), 120, 16


def train(task, n, way, lr, seed):
    """Adapt campus-nano to the n examples of a seed; what `scores` says of it, and the ranks."""
    model = copy.deepcopy(prepared(MODEL, task)[0])
    method = pefttutor.SoRA(r=12, lora_alpha=24, sparse_lambda_2=4e-3, init_seed=seed, modules_to_save=HEAD)
    method.attach(model)
    pefttutor.fit(model, drawn(MODEL, task, n, seed), steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    names = [f"{kind}{block}" for block in range(4) for kind in "qv"]
    return scores(model, MODEL, task) | dict(zip(names, method.ranks(model).values(), strict=True))


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {("animals", 256, "SoRA"): (5e-3, 2e-2)},
        columns=("task", "n", "way"),
        rates=[1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1],
        seeds=range(10),
        search_seeds=range(100, 105),
        model=MODEL,
        tasks=["animals"],
        steps=STEPS,
        batch_size=BATCH,
    )
