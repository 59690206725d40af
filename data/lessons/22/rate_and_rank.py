"""Lesson 22c: LoRA's α/r and rsLoRA's α/√r at the same α = 16, ranks 4 and 64, over ten seeds of two tasks.

    python data/lessons/22/rate_and_rank.py        goes on where it was stopped

At one rank both rules are only a factor s. The four are 4 and 8 at rank 4, and 0.25 and 2 at rank 64; the last is what
compare_ranks.py of lesson 12 has trained, so that its rows are read and three cases stand here. As there, LoRA adapts
q_proj and v_proj of campus-nano and trains the new head, for 120 steps of 16; a seed draws the examples, their order
and the factors A.

Five other seeds try each case's five rates, on 1, 2, 5, 10, …, and more as long as the best mean accuracy on the
validation split lies at an edge. These five are scored on that split alone.

Lesson 22c reads the table, rate_and_rank.jsonl.
"""

import copy

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

MODEL, HEAD, STEPS, BATCH, ALPHA = "campus-nano", ("score",), 120, 16, 16
TASKS, SEARCH = [("verdicts", 64), ("animals", 256)], range(100, 105)  # task, examples
WINDOWS = {
    ("LoRA", 4): (2e-3, 5e-2),
    ("rsLoRA", 4): (1e-3, 2e-2),
    ("LoRA", 64): (5e-3, 1e-1),
}  # five rates each


def train(task, n, rule, r, lr, seed):
    """Adapt campus-nano at one rank, under one rule, to the n examples of a seed; what `scores` says of it."""
    model = copy.deepcopy(prepared(MODEL, task)[0])
    method = pefttutor.LoRA(
        r=r, lora_alpha=ALPHA, use_rslora=rule == "rsLoRA", init_seed=seed, modules_to_save=HEAD
    )
    method.attach(model)
    pefttutor.fit(model, drawn(MODEL, task, n, seed), steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return scores(model, MODEL, task, searching=seed in SEARCH)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*case, *way): window for way, window in WINDOWS.items() for case in TASKS},
        columns=("task", "n", "rule", "r"),
        rates=[1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0],
        seeds=range(10),
        search_seeds=SEARCH,
        model=MODEL,
        tasks=[task for task, _ in TASKS],
        steps=STEPS,
        batch_size=BATCH,
        alpha=ALPHA,
    )
