"""Lesson 03: the ways of compare_small.py on campus-base, three seeds at campus-small's rates.

    python data/lessons/03/compare_base.py        after compare_small.py; goes on where it was stopped

A run of campus-base takes as long as ten of campus-nano: no rate is searched. The prompt's is the one
that compare_small.jsonl has found, so that table must be there first; `authoring tables --train` goes by name and would
begin here. Lesson 03 reads the table, compare_base.jsonl.
"""

import runpy
from pathlib import Path

from pefttutor.authoring.tables import compare, read, scores, searched

SMALL = runpy.run_path(str(Path(__file__).with_name("compare_small.py")))
MODEL, TASK = "campus-base", SMALL["TASK"]


def prompt_rate():
    """The rate that campus-small's search chose for a prompt."""
    tried = searched(*read("03/compare_small.jsonl"))[("prompt",)]
    return max(tried, key=tried.get)


def train(way, _lr, seed):
    """What `scores` says of campus-base, adapted in one way."""
    return scores(SMALL["adapted"](MODEL, way, prompt_rate(), seed), MODEL, TASK)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        dict.fromkeys(SMALL["WINDOWS"]),
        columns=("way",),
        rates=[],
        seeds=range(3),
        search_seeds=[],
        model=MODEL,
        tasks=[TASK],
        steps=SMALL["STEPS"],
        batch_size=SMALL["BATCH"],
        prompt_rate=prompt_rate(),
    )
