"""Lesson 06: the controls of compare_shuffled.py and compare_softened.py for the other target, verdicts.

    python data/lessons/06/compare_controls.py        after adapt_sources.py; goes on where it was stopped

All else is that of compare_verdicts.py. Lesson 06 reads the table, compare_controls.jsonl.
"""

import runpy
from pathlib import Path

from pefttutor.authoring.tables import compare

FIRST = runpy.run_path(str(Path(__file__).with_name("compare_shuffled.py")))
CASE, train = ("verdicts", 64), FIRST["train"]  # its ways


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*CASE, "shuffled"): (2e-3, 1e-2), (*CASE, "softened"): (1e-3, 5e-3)},
        columns=("task", "n", "way"),
        rates=FIRST["RATES"],
        seeds=range(10),
        search_seeds=FIRST["SEARCH"],
        model=FIRST["MODEL"],
        tasks=[*FIRST["SOURCES"], CASE[0]],
        steps=FIRST["STEPS"],
        batch_size=FIRST["BATCH"],
        adapters_sha256=FIRST["FIRST"]["digest"](),
    )
