"""Lesson 10: full fine-tuning, F and D on animals again, over fifty seeds that chose nothing and are new.

    python data/lessons/10/fresh_animals.py        goes on where it was stopped

As fresh_verdicts.py. Lesson 10 reads the table, fresh_animals.jsonl.
"""

import runpy
from pathlib import Path

FRESH = runpy.run_path(str(Path(__file__).with_name("fresh_verdicts.py")))
TASK, N = "animals", 256


def train(way, rate, _, seed):
    """`adapted` to animals."""
    return FRESH["adapted"](TASK, N, way, rate, seed)


if __name__ == "__main__":
    FRESH["compare_fresh"](__file__, train, TASK, N, range(10, 60))
