"""Lesson 03's appendix: a prompt that starts as one learnt on another task (SPoT), other than as drawn words.

    python data/lessons/03/compare_transfer.py        goes on where it was stopped

A seed first trains a prompt on 256 examples of `stars`, with a head of its own, at the rate that compare_prompts.py
found best for drawn words on both of its tasks; `source` is what this one then reaches on the validation split of
`stars`. Its rows are the start on a task of compare_prompts.py, whose new head is drawn as there. Everything else is as
there, and each task has a search of its own. All of it takes ten minutes on one core.

The appendix 03b reads the table, compare_transfer.jsonl.
"""

import copy
import runpy
from functools import cache
from pathlib import Path

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared

PROMPTS = runpy.run_path(str(Path(__file__).with_name("compare_prompts.py")))
MODEL, STEPS, BATCH, TOKENS = (PROMPTS[k] for k in ("MODEL", "STEPS", "BATCH", "TOKENS"))
SOURCE, SOURCE_N, SOURCE_RATE = "stars", 256, 3e-2


@cache
def source(seed):
    """A prompt learnt on the source task, and its accuracy there."""
    model = PROMPTS["prompted"](MODEL, SOURCE, SOURCE_N, TOKENS, SOURCE_RATE, seed)
    reached = pefttutor.evaluate(model, prepared(MODEL, SOURCE)[1]["validation"])["accuracy"]
    return model.model.prompt.detach().clone(), reached


def train(task, n, lr, seed):
    """Train a prompt that starts as the source's; what `judged` says of it, and the source's accuracy."""
    start, reached = source(seed)
    model = copy.deepcopy(prepared(MODEL, task)[0])
    method = pefttutor.PromptTuning(
        num_virtual_tokens=TOKENS, init_seed=seed, modules_to_save=PROMPTS["HEAD"]
    )
    method.attach(model, start)
    examples = drawn(MODEL, task, n, seed)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return PROMPTS["judged"](model, MODEL, task, seed) | {"source": reached}


if __name__ == "__main__":
    compare(
        __file__,
        train,
        dict.fromkeys(PROMPTS["CASES"], PROMPTS["WINDOW"]),
        columns=("task", "n"),
        rates=PROMPTS["RATES"],
        seeds=range(10),
        search_seeds=PROMPTS["SEARCH"],
        model=MODEL,
        tasks=[SOURCE, *(task for task, _ in PROMPTS["CASES"])],
        steps=STEPS,
        batch_size=BATCH,
        tokens=TOKENS,
        source_rate=SOURCE_RATE,
    )
