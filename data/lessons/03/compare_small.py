"""Lesson 03: a prompt of 8 virtual tokens against full fine-tuning on campus-small, five seeds.

    python data/lessons/03/compare_small.py        goes on where it was stopped

As in compare_prompts.py both ways train for 120 steps of 16, and the head with them; the frozen model's head is fitted
to its end. The prompt's rate is searched as there. Full fine-tuning isn't: it takes the one that data/README.md found
best for this model and task. Five seeds show gaps of tens of points, and nothing smaller.

Lesson 03 reads the table, compare_small.jsonl.
"""

import copy
import runpy
from pathlib import Path

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared

PROMPTS = runpy.run_path(str(Path(__file__).with_name("compare_prompts.py")))
MODEL, TASK, N, STEPS, BATCH = "campus-small", "animals", 256, PROMPTS["STEPS"], PROMPTS["BATCH"]
WINDOWS, FULL_RATE = {("frozen + head",): None, ("full",): None, ("prompt",): (1e-2, 1e-1)}, 3e-4


def adapted(name, way, lr, seed):
    """The embedded model of this name, adapted in one way to the examples of a seed."""
    if way == "prompt":
        return PROMPTS["prompted"](name, TASK, N, PROMPTS["TOKENS"], lr, seed)
    base, splits = prepared(name, TASK)
    model, examples = copy.deepcopy(base), drawn(name, TASK, N, seed)
    if way == "full":
        pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=FULL_RATE, seed=seed)
    else:
        pefttutor.fit_head(model, examples, splits["validation"])
    return model


def train(way, lr, seed):
    """What `judged` says of campus-small, adapted in one way."""
    return PROMPTS["judged"](adapted(MODEL, way, lr, seed), MODEL, TASK, seed)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        WINDOWS,
        columns=("way",),
        rates=PROMPTS["RATES"],
        seeds=range(5),
        search_seeds=PROMPTS["SEARCH"],
        model=MODEL,
        tasks=[TASK],
        steps=STEPS,
        batch_size=BATCH,
        tokens=PROMPTS["TOKENS"],
        full_rate=FULL_RATE,
    )
