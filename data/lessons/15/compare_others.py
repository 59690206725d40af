"""Lesson 15: MiLoRA, LoRA-FA and LoRA+ of rank 8 on 256 lists of animals, over ten seeds.

    python data/lessons/15/compare_others.py        goes on where it was stopped

MiLoRA starts at the eight weakest directions of a weight. LoRA-FA leaves the factor A as it was drawn. LoRA+ trains B
at 16 times the rate of A and of the head, which is the one that stands in the table. Each adapts q_proj and v_proj of
campus-nano with the factor α/r = 2, and trains the new head, for 120 steps of 16, as LoRA does in compare_ranks.py of
lesson 12. A seed draws the examples, their order and, but for MiLoRA, the factors A. Learning rates lie on 1, 2, 5,
10, …: five other seeds try 0.005, 0.01 and 0.02, LoRA+ 0.002 too, and more as long as the best mean accuracy on the
validation split lies at an edge.

Lesson 15 reads the table, compare_others.jsonl.
"""

import copy

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

MODEL, HEAD, STEPS, BATCH = "campus-nano", ("score",), 120, 16
TASK, N = "animals", 256
WINDOWS = {"MiLoRA": (5e-3, 2e-2), "LoRA-FA": (5e-3, 2e-2), "LoRA+": (2e-3, 2e-2)}


def train(task, n, way, lr, seed):
    """Adapt campus-nano in one way to the n examples of a seed; what `scores` says of it."""
    model = copy.deepcopy(prepared(MODEL, task)[0])
    settings = {"r": 8, "lora_alpha": 16, "modules_to_save": HEAD}
    method = {
        "MiLoRA": lambda: pefttutor.MiLoRA(**settings),
        "LoRA-FA": lambda: pefttutor.LoRAFA(init_seed=seed, **settings),
        "LoRA+": lambda: pefttutor.LoRAPlus(init_seed=seed, **settings),
    }[way]()
    method.attach(model)
    examples = drawn(MODEL, task, n, seed)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return scores(model, MODEL, task)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(TASK, N, way): window for way, window in WINDOWS.items()},
        columns=("task", "n", "way"),
        rates=[1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1],
        seeds=range(10),
        search_seeds=range(100, 105),
        model=MODEL,
        tasks=[TASK],
        steps=STEPS,
        batch_size=BATCH,
    )
