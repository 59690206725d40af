"""Lesson 06: the fusion of compare_animals.py for another small target: verdicts, 64 examples.

    python data/lessons/06/compare_verdicts.py        after adapt_sources.py; goes on where it was stopped

Adapters, steps, seeds and search are those of compare_animals.py. Lesson 06 reads the table, compare_verdicts.jsonl.
"""

import runpy
from pathlib import Path

from pefttutor.authoring.tables import compare

FIRST = runpy.run_path(str(Path(__file__).with_name("compare_animals.py")))
CASE, WINDOW = ("verdicts", 64), (1e-3, 5e-3)


def train(task, n, way, lr, seed):
    """Fuse the adapters as they are."""
    return FIRST["trained"](task, n, lr, seed)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*CASE, "fusion"): WINDOW},
        columns=("task", "n", "way"),
        rates=FIRST["RATES"],
        seeds=range(10),
        search_seeds=FIRST["SEARCH"],
        model=FIRST["MODEL"],
        tasks=[*FIRST["SOURCES"], CASE[0]],
        steps=FIRST["STEPS"],
        batch_size=FIRST["BATCH"],
        adapters_sha256=FIRST["digest"](),
    )
