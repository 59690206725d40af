"""Lesson 14: IncreLoRA on few examples of one task, over ten seeds.

    python data/lessons/14/compare_increlora.py        goes on where it was stopped

As AdaLoRA and "ranks that stay" in compare_adalora.py: q_proj and v_proj of campus-nano, s = 2, γ = 0.1, eight triplets
a layer on average in the end, a new head, 120 steps of 16. IncreLoRA begins with one triplet a layer; every five steps
four of the eight layers get one more, until after 71 steps 64 are given out, to none more than 12.

A seed draws the examples, their order, P and Q. Learning rates lie on 1, 2, 5, 10, …: five other seeds try the first
window, which is widened as long as the best mean accuracy on the validation split lies at its edge. The columns q0, v0,
… are the ranks in the end, of q_proj and v_proj in each block.

Appendix 14b reads the table, compare_increlora.jsonl.
"""

import copy

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores
from pefttutor.data.evaluation import evaluate

MODEL, HEAD, STEPS, BATCH = "campus-nano", ("score",), 120, 16
GROWING = {"target_r": 8, "max_r": 12, "incre_interval": 5, "top_h": 4, "lora_alpha": 16}
SEARCH = range(100, 105)


def train(task, n, way, lr, seed):
    """Adapt campus-nano to the n examples of a seed; what `scores` says of it, and the ranks."""
    model = copy.deepcopy(prepared(MODEL, task)[0])
    method = pefttutor.IncreLoRA(**GROWING, orth_reg_weight=0.1, init_seed=seed, modules_to_save=HEAD)
    method.attach(model)
    pefttutor.fit(model, drawn(MODEL, task, n, seed), steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    if seed in SEARCH:  # the search looks at nothing else
        return {"validation": evaluate(model, prepared(MODEL, task)[1]["validation"])["accuracy"]}
    names = [f"{kind}{block}" for block in range(4) for kind in "qv"]
    return scores(model, MODEL, task) | dict(zip(names, method.ranks(model).values(), strict=True))


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {("animals", 256, "IncreLoRA"): (2e-2, 5e-2)},
        columns=("task", "n", "way"),
        rates=[1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1],
        seeds=range(10),
        search_seeds=SEARCH,
        model=MODEL,
        tasks=["animals"],
        steps=STEPS,
        batch_size=BATCH,
    )
