"""Lesson 14: AdaLoRA, and AdaLoRA with one of its ideas taken away, on few examples of two tasks, over ten seeds.

    python data/lessons/14/compare_adalora.py        goes on where it was stopped

All adapt q_proj and v_proj of campus-nano with the factor s = 2, end with 8 triplets a layer on average, and train the
new head, for 120 steps of 16, as lesson 12's LoRA of rank 8. AdaLoRA begins with 12 triplets a layer, loses ranks
between steps 20 and 80, and has γ = 0.1, as the authors' scripts. "no penalty", which animals alone has, has γ = 0;
"ranks that stay" begins and ends with 8 triplets in every layer.

A seed draws the examples, their order, P and Q. Learning rates lie on 1, 2, 5, 10, …: five other seeds try each way's
first window, which is widened as long as the best mean accuracy on the validation split lies at its edge. The columns
q0, v0, … are the ranks in the end, of q_proj and v_proj in each block.

Lesson 14 reads the table, compare_adalora.jsonl. LoRA of rank 8 stands in compare_ranks.jsonl of lesson 12, full
fine-tuning and the frozen model with a converged head in compare_masks.jsonl of lesson 09.
"""

import copy

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

MODEL, HEAD, STEPS, BATCH = "campus-nano", ("score",), 120, 16
CASES = {
    ("animals", 256, "AdaLoRA"): (5e-2, 2e-1),
    ("animals", 256, "ranks that stay"): (5e-2, 2e-1),
    ("animals", 256, "no penalty"): (2e-2, 1e-1),
    ("verdicts", 64, "AdaLoRA"): (2e-2, 1e-1),
    ("verdicts", 64, "ranks that stay"): (2e-2, 1e-1),
}
WAYS = {
    "AdaLoRA": {"init_r": 12, "tinit": 20, "tfinal": 40},
    "no penalty": {"init_r": 12, "tinit": 20, "tfinal": 40, "orth_reg_weight": 0.0},
    "ranks that stay": {"init_r": 8},
}


def train(task, n, way, lr, seed):
    """Adapt campus-nano in one way to the n examples of a seed; what `scores` says of it, and the ranks."""
    model = copy.deepcopy(prepared(MODEL, task)[0])
    settings = {"orth_reg_weight": 0.1, "modules_to_save": HEAD, "init_seed": seed} | WAYS[way]
    alpha = 2 * settings["init_r"]
    method = pefttutor.AdaLoRA(target_r=8, total_step=STEPS, lora_alpha=alpha, **settings)
    method.attach(model)
    pefttutor.fit(model, drawn(MODEL, task, n, seed), steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    names = [f"{kind}{block}" for block in range(4) for kind in "qv"]
    return scores(model, MODEL, task) | dict(zip(names, method.ranks(model).values(), strict=True))


if __name__ == "__main__":
    compare(
        __file__,
        train,
        CASES,
        columns=("task", "n", "way"),
        rates=[1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1],
        seeds=range(10),
        search_seeds=range(100, 105),
        model=MODEL,
        tasks=["animals", "verdicts"],
        steps=STEPS,
        batch_size=BATCH,
    )
