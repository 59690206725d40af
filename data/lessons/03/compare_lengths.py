"""Lesson 03: shorter and longer prompts than the 8 virtual tokens of compare_prompts.py, over ten seeds.

    python data/lessons/03/compare_lengths.py        goes on where it was stopped

Everything else is as there, and each length has a search of its own. Lesson 03 reads the table, compare_lengths.jsonl.
"""

import runpy
from pathlib import Path

from pefttutor.authoring.tables import compare

PROMPTS = runpy.run_path(str(Path(__file__).with_name("compare_prompts.py")))
MODEL, TASK, N, LENGTHS = PROMPTS["MODEL"], "animals", 256, (1, 20)


def train(tokens, lr, seed):
    """Train a prompt of so many tokens; what `judged` says of it."""
    model = PROMPTS["prompted"](MODEL, TASK, N, tokens, lr, seed)
    return PROMPTS["judged"](model, MODEL, TASK, seed)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(tokens,): PROMPTS["WINDOW"] for tokens in LENGTHS},
        columns=("tokens",),
        rates=PROMPTS["RATES"],
        seeds=range(10),
        search_seeds=PROMPTS["SEARCH"],
        model=MODEL,
        tasks=[TASK],
        steps=PROMPTS["STEPS"],
        batch_size=PROMPTS["BATCH"],
    )
