"""Lesson 12: LoRA of rank 1 to 64 on few examples of two tasks, over ten seeds.

    python data/lessons/12/compare_ranks.py        goes on where it was stopped

LoRA adapts q_proj and v_proj of campus-nano with the factor α/r = 2, and trains the new head, for 120 steps of 16. A
seed draws the examples, their order and the factors A. Learning rates lie on 1, 2, 5, 10, …: five other seeds try each
rank's first window, which is widened as long as the best mean accuracy on the validation split lies at its edge.

Lesson 12 reads the table, compare_ranks.jsonl. Full fine-tuning and the frozen model with a converged head, on the same
examples, stand in compare_masks.jsonl of lesson 09.
"""

import copy

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

MODEL, HEAD, STEPS, BATCH = "campus-nano", ("score",), 120, 16
CASES, RANKS, WINDOW = [("verdicts", 64), ("animals", 256)], (1, 8, 64), (5e-3, 2e-2)


def train(task, n, r, lr, seed):
    """Adapt campus-nano at one rank to the n examples of a seed; what `scores` says of it."""
    model = copy.deepcopy(prepared(MODEL, task)[0])
    pefttutor.LoRA(r=r, lora_alpha=2 * r, init_seed=seed, modules_to_save=HEAD).attach(model)
    examples = drawn(MODEL, task, n, seed)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return scores(model, MODEL, task)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*case, r): WINDOW for case in CASES for r in RANKS},
        columns=("task", "n", "r"),
        rates=[1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1],
        seeds=range(10),
        search_seeds=range(100, 105),
        model=MODEL,
        tasks=[task for task, _ in CASES],
        steps=STEPS,
        batch_size=BATCH,
    )
