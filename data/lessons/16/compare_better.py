"""Lesson 16: the ways of compare_ways.py on another unseen task, better: which of two guests liked it more?

    python data/lessons/16/compare_better.py        after train_plugins.py; goes on where it was stopped

Its prompts are twice as long, so that sixteen examples don't fit into the window, and in context there are four.
Everything else is as there, and each way that has a learning rate has a search of its own.

Lesson 16 reads the table, compare_better.jsonl.
"""

import runpy
from pathlib import Path

from pefttutor.authoring.tables import compare

FIRST = runpy.run_path(str(Path(__file__).with_name("compare_ways.py")))
TASK = "better"
WAYS = {way: window for way, window in FIRST["WAYS"].items() if way != "in context, 16"}


def train(task, way, lr, seed):
    """What compare_ways.py's `train` says of this task."""
    return FIRST["train"](task, way, lr, seed)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(TASK, way): window for way, window in WAYS.items()},
        columns=("task", "way"),
        rates=[5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1],
        seeds=range(10),
        search_seeds=FIRST["SEARCH"],
        model=FIRST["MODEL"],
        tasks=[TASK, *FIRST["UPSTREAM"], "world_text"],
        examples=FIRST["N"],
        tries=FIRST["TRIES"],
        looked_at={"test": FIRST["TEST"], "validation": FIRST["VALIDATION"], "world_text": FIRST["WORLD"]},
        adapters_sha256=FIRST["digest"](),
    )
