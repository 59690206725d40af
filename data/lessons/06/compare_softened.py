"""Lesson 06: the fusion of compare_animals.py with a softer start.

    python data/lessons/06/compare_softened.py        after adapt_sources.py; goes on where it was stopped

K starts √d times smaller, so that at the start all scores are those of equation 6.1 divided by √d. All else is that of
compare_animals.py. Lesson 06 reads the table, compare_softened.jsonl.
"""

import runpy
from pathlib import Path

from pefttutor.authoring.tables import compare

FIRST = runpy.run_path(str(Path(__file__).with_name("compare_shuffled.py")))
train = FIRST["train"]  # its way "softened"


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*FIRST["CASE"], "softened"): FIRST["WINDOW"]},
        columns=("task", "n", "way"),
        rates=FIRST["RATES"],
        seeds=range(10),
        search_seeds=FIRST["SEARCH"],
        model=FIRST["MODEL"],
        tasks=[*FIRST["SOURCES"], FIRST["CASE"][0]],
        steps=FIRST["STEPS"],
        batch_size=FIRST["BATCH"],
        adapters_sha256=FIRST["FIRST"]["digest"](),
    )
