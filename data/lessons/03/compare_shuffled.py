"""Lesson 03's appendix: the control of compare_transfer.py, whose learnt prompt starts with its numbers shuffled.

    python data/lessons/03/compare_shuffled.py        goes on where it was stopped

A seed's source prompt is the one of compare_transfer.py, trained again. Within each of its rows the numbers are
shuffled, so that a row keeps its length and all its numbers, but points nowhere that training led to. Everything else
is as there, with a search of its own, on `verdicts` alone. All of it takes eight minutes on one core.

The appendix 03b reads the table, compare_shuffled.jsonl.
"""

import copy
import runpy
from pathlib import Path

import torch

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared

TRANSFER = runpy.run_path(str(Path(__file__).with_name("compare_transfer.py")))
PROMPTS, SOURCE = TRANSFER["PROMPTS"], TRANSFER["SOURCE"]
MODEL, STEPS, BATCH, TOKENS = (PROMPTS[k] for k in ("MODEL", "STEPS", "BATCH", "TOKENS"))
TASK, N = "verdicts", 64


def shuffled(prompt, seed):
    """(rows, width) → the same: each row has its own numbers, in an order drawn by the seed."""
    order = torch.rand(prompt.shape, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return prompt.gather(1, order)


def train(_start, lr, seed):
    """Train a prompt that starts as the source's, shuffled; what `judged` says of it."""
    start, reached = TRANSFER["source"](seed)
    model = copy.deepcopy(prepared(MODEL, TASK)[0])
    method = pefttutor.PromptTuning(
        num_virtual_tokens=TOKENS, init_seed=seed, modules_to_save=PROMPTS["HEAD"]
    )
    method.attach(model, shuffled(start, seed))
    examples = drawn(MODEL, TASK, N, seed)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return PROMPTS["judged"](model, MODEL, TASK, seed) | {"source": reached}


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {("shuffled",): PROMPTS["WINDOW"]},
        columns=("start",),
        rates=PROMPTS["RATES"],
        seeds=range(10),
        search_seeds=PROMPTS["SEARCH"],
        model=MODEL,
        tasks=[SOURCE, TASK],
        steps=STEPS,
        batch_size=BATCH,
        tokens=TOKENS,
        source_rate=TRANSFER["SOURCE_RATE"],
    )
