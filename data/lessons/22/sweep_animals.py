"""Lesson 22: LoRA of rank 8 on the attention, on the MLPs, and on every linear layer, over ten seeds of 256 lists.

    python data/lessons/22/sweep_animals.py        goes on where it was stopped

LoRA with the factor α/r = 2 adapts the attention's four projections, the MLP's three, or all seven, in every block of
campus-nano, and trains the new head, for 120 steps of 16 on 256 lists of animals, as it does on q_proj and v_proj in
compare_ranks.py of lesson 12. A seed draws the examples, their order and the factors A. Learning rates lie on 1, 2, 5,
10, …: five other seeds try three of them, and more as long as the best mean accuracy on the validation split lies at an
edge. These five are scored on that split alone.

Lesson 22 reads the table, sweep_animals.jsonl. Full fine-tuning on the same examples stands in compare_masks.jsonl of
lesson 09.
"""

import copy

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

MODEL, HEAD, STEPS, BATCH = "campus-nano", ("score",), 120, 16
TASK, N, SEARCH = "animals", 256, range(100, 105)
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
PLACES = {"all": ATTENTION + MLP, "mlp": MLP, "attention": ATTENTION}
WINDOWS = {"all": (2e-3, 1e-2), "mlp": (5e-3, 2e-2), "attention": (5e-3, 2e-2)}


def train(task, n, way, lr, seed):
    """Adapt campus-nano in one place to the n examples of a seed; what `scores` says of it, or validation alone."""
    base, splits = prepared(MODEL, task)
    model = copy.deepcopy(base)
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
        {(TASK, N, way): window for way, window in WINDOWS.items()},
        columns=("task", "n", "way"),
        rates=[1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1],
        seeds=range(10),
        search_seeds=SEARCH,
        model=MODEL,
        tasks=[TASK],
        steps=STEPS,
        batch_size=BATCH,
    )
