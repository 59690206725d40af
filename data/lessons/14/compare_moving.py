"""Lesson 14: SoRA, IncreLoRA and the other DoRA on few examples of two tasks, over ten seeds.

    python data/lessons/14/compare_moving.py        goes on where it was stopped

As compare_adalora.py: q_proj and v_proj of campus-nano, s = 2, a new head, 120 steps of 16. SoRA begins with 12
directions a layer, and the pull on its gates is such that 7 to 8 were left where it was tried, on seed 100 of animals.
IncreLoRA has γ = 0.1 and begins with one triplet a layer; every five steps four of the eight layers get one more, until
after 71 steps 64 are given out, to none more than 12. DynamicDoRA begins with 12 triplets a layer and loses ranks
between steps 18 and 60, as its authors' script, and its penalty has their weight, 0.1.

A seed draws the examples, their order and the factors. Learning rates lie on 1, 2, 5, 10, …: five other seeds try each
way's first window, which is widened as long as the best mean accuracy on the validation split lies at its edge. The
columns q0, v0, … are the ranks in the end, of q_proj and v_proj in each block.

Appendix 14b reads the table, compare_moving.jsonl.
"""

import copy

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

MODEL, STEPS, BATCH = "campus-nano", 120, 16
CASES, SEARCH = [("animals", 256), ("verdicts", 64)], range(100, 105)  # task, examples
WINDOWS = {"SoRA": (5e-3, 2e-2), "IncreLoRA": (2e-2, 5e-2), "DynamicDoRA": (5e-3, 2e-2)}
GROWING = {
    "target_r": 8,
    "max_r": 12,
    "incre_interval": 5,
    "top_h": 4,
    "lora_alpha": 16,
    "orth_reg_weight": 0.1,
}


def train(task, n, way, lr, seed):
    """Adapt campus-nano to the n examples of a seed; what `scores` says of it, and the ranks."""
    model = copy.deepcopy(prepared(MODEL, task)[0])
    beside = {"init_seed": seed, "modules_to_save": ("score",)}
    match way:
        case "SoRA":
            method = pefttutor.SoRA(r=12, lora_alpha=24, sparse_lambda_2=4e-3, **beside)
        case "IncreLoRA":
            method = pefttutor.IncreLoRA(**GROWING, **beside)
        case "DynamicDoRA":
            method = pefttutor.DynamicDoRA(init_r=12, target_r=8, total_step=STEPS, lora_alpha=24, **beside)
    method.attach(model)
    pefttutor.fit(model, drawn(MODEL, task, n, seed), steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    names = [f"{kind}{block}" for block in range(4) for kind in "qv"]
    ranks = dict(zip(names, method.ranks(model).values(), strict=True))
    return scores(model, MODEL, task, searching=seed in SEARCH) | ranks


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*case, way): window for case in CASES for way, window in WINDOWS.items()},
        columns=("task", "n", "way"),
        rates=[1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1],
        seeds=range(10),
        search_seeds=SEARCH,
        model=MODEL,
        tasks=[task for task, _ in CASES],
        steps=STEPS,
        batch_size=BATCH,
    )
