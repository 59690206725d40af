"""Lesson 15: LoRA's two factors at rates of their own, over ten seeds of two tasks.

    python data/lessons/15/compare_factors.py        goes on where it was stopped

LoRA+ trains B at λ = 16 times the rate of A, and the new head at A's rate; LoRA-FA leaves A as it was drawn. Each
adapts q_proj and v_proj of campus-nano with r = 8 and the factor α/r = 2 for 120 steps of 16, as LoRA, which is λ = 1,
does in compare_ranks.py of lesson 12. A seed draws the examples, their order and the factors A. The column lr is the
rate of the head. Learning rates lie on 1, 2, 5, 10, …: five other seeds try each way's first window, and more as long
as the best mean accuracy on the validation split lies at an edge.

Appendix 15c reads the table, compare_factors.jsonl.
"""

import copy

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

MODEL, STEPS, BATCH = "campus-nano", 120, 16
CASES, SEARCH = [("verdicts", 64), ("animals", 256)], range(100, 105)  # task, examples
WINDOWS = {"LoRA+": (2e-3, 5e-3), "LoRA-FA": (2e-2, 5e-2)}
METHODS = {"LoRA+": pefttutor.LoRAPlus, "LoRA-FA": pefttutor.LoRAFA}  # λ is 16 where nothing is said


def train(task, n, way, lr, seed):
    """Adapt campus-nano to the n examples of a seed; what `scores` says of it."""
    model = copy.deepcopy(prepared(MODEL, task)[0])
    METHODS[way](r=8, lora_alpha=16, init_seed=seed, modules_to_save=("score",)).attach(model)
    pefttutor.fit(model, drawn(MODEL, task, n, seed), steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return scores(model, MODEL, task, searching=seed in SEARCH)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*case, way): window for case in CASES for way, window in WINDOWS.items()},
        columns=("task", "n", "way"),
        rates=[1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1],
        seeds=range(10),
        search_seeds=SEARCH,
        model=MODEL,
        tasks=[task for task, _ in CASES],
        steps=STEPS,
        batch_size=BATCH,
    )
