"""Lesson 12: LoRA of rank 1 to 64 between a converged head and full fine-tuning, over ten seeds.

    python data/lessons/12/compare_ranks.py        goes on where it was stopped

Every way trains campus-nano for 120 steps of 16, but for the frozen model with a head that is fitted to its end. LoRA
adapts q_proj and v_proj, or, at one rank, all seven matrices of a block, with the factor α/r = 2, and trains the new
head. A seed draws the examples, their order and the factors A. Learning rates lie on 1, 3, 10, …: five other seeds
try a way's first window, which is widened as long as the best mean accuracy on the validation split lies at its edge.

Lesson 12 reads the table, compare_ranks.jsonl.
"""

import copy

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

MODEL, HEAD, STEPS, BATCH = "campus-nano", ("score",), 120, 16
CASES = [("verdicts", 64), ("animals", 256)]  # task, examples
TARGETS = {"q, v": ("q_proj", "v_proj"), "all": "all-linear"}
WINDOWS = {("frozen + head", 0): None, ("full", 0): (3e-4, 3e-3)} | {
    way: (3e-3, 3e-2) for way in (("q, v", 1), ("q, v", 4), ("q, v", 16), ("q, v", 64), ("all", 16))
}


def train(task, n, way, r, lr, seed):
    """Adapt campus-nano in one way to the n examples of a seed; what `scores` says of it."""
    base, splits = prepared(MODEL, task)
    model, examples = copy.deepcopy(base), drawn(MODEL, task, n, seed)
    if way == "frozen + head":
        pefttutor.fit_head(model, examples, splits["validation"])
        return scores(model, MODEL, task)
    if way in TARGETS:
        lora = pefttutor.LoRA(
            r=r, lora_alpha=2 * r, target_modules=TARGETS[way], modules_to_save=HEAD, init_seed=seed
        )
        lora.attach(model)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return scores(model, MODEL, task)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*case, *way): window for case in CASES for way, window in WINDOWS.items()},
        columns=("task", "n", "way", "r"),
        rates=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1],
        seeds=range(10),
        search_seeds=range(100, 105),
        model=MODEL,
        tasks=[task for task, _ in CASES],
        steps=STEPS,
        batch_size=BATCH,
    )
