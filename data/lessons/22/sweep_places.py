"""Lesson 22: full fine-tuning and LoRA in three places, each at seven learning rates, over ten seeds of two tasks.

    python data/lessons/22/sweep_places.py        goes on where it was stopped

LoRA of rank 8 with the factor α/r = 2 adapts the attention's four projections, the MLP's three, or all seven, in every
block of campus-nano; full fine-tuning moves everything. Each trains the new head, too, for 120 steps of 16, as LoRA
does on q_proj and v_proj in compare_ranks.py of lesson 12. A seed draws the examples, their order and the factors A.
Five other seeds try each of a way's seven rates, on 1, 2, 5, 10, …, so that every way has its whole curve, and more as
long as the best mean accuracy on the validation split lies at an edge. These five are scored on that split alone.

Lesson 22 reads the table, sweep_places.jsonl.
"""

import copy

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

MODEL, HEAD, STEPS, BATCH = "campus-nano", ("score",), 120, 16
CASES, SEARCH = [("animals", 256), ("verdicts", 64)], range(100, 105)  # task, examples
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
PLACES = {"mlp": MLP, "all": ATTENTION + MLP, "attention": ATTENTION}
WINDOWS = dict.fromkeys(PLACES, (1e-3, 1e-1)) | {"full": (1e-4, 1e-2)}  # seven rates each


def train(task, n, way, lr, seed):
    """Adapt campus-nano in one way to the n examples of a seed; what `scores` says of it, or validation alone."""
    base, splits = prepared(MODEL, task)
    model = copy.deepcopy(base)
    if way != "full":
        method = pefttutor.LoRA(
            r=8, lora_alpha=16, target_modules=PLACES[way], init_seed=seed, modules_to_save=HEAD
        )
        method.attach(model)
    pefttutor.fit(model, drawn(MODEL, task, n, seed), steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    if seed in SEARCH:
        return {"validation": pefttutor.evaluate(model, splits["validation"])["accuracy"]}
    return scores(model, MODEL, task)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*case, way): window for way, window in WINDOWS.items() for case in CASES},
        columns=("task", "n", "way"),
        rates=[1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1],
        seeds=range(10),
        search_seeds=SEARCH,
        model=MODEL,
        tasks=[task for task, _ in CASES],
        steps=STEPS,
        batch_size=BATCH,
    )
