"""Lesson 15: PiSSA of rank 8 on 64 examples of verdicts, over ten seeds.

    python data/lessons/15/pissa_verdicts.py        goes on where it was stopped

PiSSA starts at the eight strongest directions of q_proj and v_proj of campus-nano, with the factor α/r = 2, and
trains them and the new head for 120 steps of 16, as LoRA does in compare_ranks.py of lesson 12. A seed draws the
examples and their order. Learning rates lie on 1, 2, 5, 10, …: five other seeds try 0.005, 0.01 and 0.02, and more as
long as the best mean accuracy on the validation split lies at an edge.

Lesson 15 reads the table, pissa_verdicts.jsonl.
"""

import copy

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

MODEL, HEAD, STEPS, BATCH = "campus-nano", ("score",), 120, 16
TASK, N, WINDOW = "verdicts", 64, (5e-3, 2e-2)


def train(task, n, way, lr, seed):
    """Adapt campus-nano to the n examples of a seed; what `scores` says of it."""
    model = copy.deepcopy(prepared(MODEL, task)[0])
    pefttutor.PiSSA(r=8, lora_alpha=16, modules_to_save=HEAD).attach(model)
    examples = drawn(MODEL, task, n, seed)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return scores(model, MODEL, task)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(TASK, N, "PiSSA"): WINDOW},
        columns=("task", "n", "way"),
        rates=[1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1],
        seeds=range(10),
        search_seeds=range(100, 105),
        model=MODEL,
        tasks=[TASK],
        steps=STEPS,
        batch_size=BATCH,
    )
