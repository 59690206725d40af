"""Lesson 04: two other ways beside those of compare_prefixes.py, over ten seeds of one of its tasks.

    python data/lessons/04/compare_encoders.py        goes on where it was stopped

"words" is a prefix that trains itself, but starts as the keys and values that the frozen model computes of 8 words,
drawn by the seed among the vocabulary's entries without a special meaning. "P-tuning" has 8 virtual tokens in front of
the text, which an LSTM makes. Everything else is as there, and each way has a search of its own. Lesson 04 reads the
table, compare_encoders.jsonl.
"""

import copy
import runpy
from pathlib import Path

import torch

import pefttutor
from pefttutor import models
from pefttutor.authoring.tables import compare, drawn, prepared

PREFIXES = runpy.run_path(str(Path(__file__).with_name("compare_prefixes.py")))
PROMPTS, MODEL, HEAD, STEPS, BATCH, TOKENS = (
    PREFIXES[name] for name in ("PROMPTS", "MODEL", "HEAD", "STEPS", "BATCH", "TOKENS")
)
TASK, N = "animals", 256
WAYS = {"words": (1e-2, 1e-1), "P-tuning": (1e-3, 1e-2)}  # each with its first window of rates


def words(seed):
    """Token ids that a seed draws among those of words."""
    tokenizer = models.load(MODEL)[1]
    ids = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    return [ids[i] for i in order[:TOKENS].tolist()]


def train(way, lr, seed):
    """Train in one way; what `judged` of compare_prompts.py says of it."""
    model, settings = copy.deepcopy(prepared(MODEL, TASK)[0]), {"init_seed": seed, "modules_to_save": HEAD}
    if way == "words":
        pefttutor.PrefixTuning(num_virtual_tokens=TOKENS, **settings).attach(model, words(seed))
    else:
        pefttutor.PTuning(num_virtual_tokens=TOKENS, encoder="lstm", **settings).attach(model)
    examples = drawn(MODEL, TASK, N, seed)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return PROMPTS["judged"](model, MODEL, TASK, seed)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(way,): window for way, window in WAYS.items()},
        columns=("way",),
        rates=PROMPTS["RATES"],
        seeds=range(10),
        search_seeds=PROMPTS["SEARCH"],
        model=MODEL,
        tasks=[TASK],
        steps=STEPS,
        batch_size=BATCH,
        tokens=TOKENS,
    )
