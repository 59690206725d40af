"""Lesson 03: a prompt and full fine-tuning on campus-small for 375 steps instead of compare_small.py's 120, five seeds.

    python data/lessons/03/longer_small.py        goes on where it was stopped

Both ways have a rate of their own, searched on two other seeds, and a new head that trains beside them. `train` is the
accuracy on the examples that were learnt from. A run takes a bit more than a minute on one free core, all 24 of them a
quarter of an hour on two.

Lesson 03 reads the table, longer_small.jsonl.
"""

import copy
import runpy
from pathlib import Path

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared

PROMPTS = runpy.run_path(str(Path(__file__).with_name("compare_prompts.py")))
MODEL, TASK, N, STEPS, BATCH = "campus-small", "animals", 256, 375, PROMPTS["BATCH"]
WINDOWS = {("full",): (1e-4, 1e-3), ("prompt",): (1e-2, 1e-1)}
RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]


def longer(name, way, lr, seed):
    """What `judged` says of the model of this name, adapted in one way, and its accuracy on what it learnt from."""
    model, examples = copy.deepcopy(prepared(name, TASK)[0]), drawn(name, TASK, N, seed)
    if way == "prompt":
        pefttutor.PromptTuning(
            num_virtual_tokens=PROMPTS["TOKENS"], init_seed=seed, modules_to_save=PROMPTS["HEAD"]
        ).attach(model)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    found = PROMPTS["judged"](model, name, TASK, seed)
    return found | {"train": pefttutor.evaluate(model, examples)["accuracy"]}


def train(way, lr, seed):
    """What `longer` says of campus-small."""
    return longer(MODEL, way, lr, seed)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        WINDOWS,
        columns=("way",),
        rates=RATES,
        seeds=range(5),
        search_seeds=[100, 101],
        model=MODEL,
        tasks=[TASK],
        steps=STEPS,
        batch_size=BATCH,
        tokens=PROMPTS["TOKENS"],
    )
