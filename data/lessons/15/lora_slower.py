"""Lesson 15: LoRA of rank 8 on 64 examples of verdicts at half the rate that its search chose, over ten seeds.

    python data/lessons/15/lora_slower.py        goes on where it was stopped

In compare_ranks.py of lesson 12 the search chose 0.02, and on ten other seeds LoRA fell far below what the search had
seen. This is the same training at 0.01, the next rate below: no search, a question about that choice.

Lesson 15 reads the table, lora_slower.jsonl.
"""

import copy

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

MODEL, HEAD, STEPS, BATCH, RATE = "campus-nano", ("score",), 120, 16, 1e-2
TASK, N = "verdicts", 64


def train(task, n, way, lr, seed):
    """Adapt campus-nano to the n examples of a seed; what `scores` says of it."""
    model = copy.deepcopy(prepared(MODEL, task)[0])
    pefttutor.LoRA(r=8, lora_alpha=16, init_seed=seed, modules_to_save=HEAD).attach(model)
    examples = drawn(MODEL, task, n, seed)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=RATE, seed=seed)
    return scores(model, MODEL, task)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(TASK, N, "LoRA at 0.01"): None},
        columns=("task", "n", "way"),
        rates=[RATE],
        seeds=range(10),
        search_seeds=range(100, 105),
        model=MODEL,
        tasks=[TASK],
        steps=STEPS,
        batch_size=BATCH,
    )
