"""Lesson 03: the two ways of longer_small.py on campus-base, three seeds; one other seed searches for the rates.

    python data/lessons/03/longer_base.py        goes on where it was stopped

A run takes two to three minutes on one free core, all twelve of them less than twenty minutes on two.
Lesson 03 reads the table, longer_base.jsonl.
"""

import runpy
from pathlib import Path

from pefttutor.authoring.tables import compare

LONGER = runpy.run_path(str(Path(__file__).with_name("longer_small.py")))
MODEL = "campus-base"


def train(way, lr, seed):
    """What `longer` says of campus-base."""
    return LONGER["longer"](MODEL, way, lr, seed)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {("full",): (3e-4, 3e-3), ("prompt",): (1e-2, 1e-1)},
        columns=("way",),
        rates=LONGER["RATES"],
        seeds=range(3),
        search_seeds=[100],
        model=MODEL,
        tasks=[LONGER["TASK"]],
        steps=LONGER["STEPS"],
        batch_size=LONGER["BATCH"],
        tokens=LONGER["PROMPTS"]["TOKENS"],
    )
