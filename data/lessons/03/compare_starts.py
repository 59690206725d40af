"""Lesson 03: where a prompt of 8 virtual tokens starts, other than as the drawn words of compare_prompts.py.

    python data/lessons/03/compare_starts.py        goes on where it was stopped

"labels": the first rows start as the words of the task's classes, the others as drawn words. "random": all start
uniform in ±½. Everything else is as there, and each start has a search of its own. Lesson 03 reads the table,
compare_starts.jsonl.
"""

import copy
import runpy
from pathlib import Path

import pefttutor
from pefttutor import data, models
from pefttutor.authoring.tables import compare, drawn, prepared

PROMPTS = runpy.run_path(str(Path(__file__).with_name("compare_prompts.py")))
MODEL, STEPS, BATCH, TOKENS, TASK, N = (
    *(PROMPTS[k] for k in ("MODEL", "STEPS", "BATCH", "TOKENS")),
    "animals",
    256,
)
INITS = {"labels": "vocabulary", "random": "random"}  # where the rows start that have no label


def train(start, lr, seed):
    """Train a prompt from this start; what `judged` says of it."""
    model, words = copy.deepcopy(prepared(MODEL, TASK)[0]), None
    if start == "labels":
        tokenizer, labels = models.load(MODEL)[1], [f" {label}" for label in data.info(TASK).labels]
        words = tokenizer(labels, add_special_tokens=False)["input_ids"]
    method = pefttutor.PromptTuning(
        num_virtual_tokens=TOKENS, init=INITS[start], init_seed=seed, modules_to_save=PROMPTS["HEAD"]
    )
    method.attach(model, words)
    examples = drawn(MODEL, TASK, N, seed)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return PROMPTS["judged"](model, MODEL, TASK, seed)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(start,): PROMPTS["WINDOW"] for start in INITS},
        columns=("start",),
        rates=PROMPTS["RATES"],
        seeds=range(10),
        search_seeds=PROMPTS["SEARCH"],
        model=MODEL,
        tasks=[TASK],
        steps=STEPS,
        batch_size=BATCH,
        tokens=TOKENS,
    )
