"""Lesson 07: campus-base tuned directly, on the examples of steer_by_nano.py, over the same ten seeds.

    python data/lessons/07/tune_base.py        goes on where it was stopped

Every weight, in as many steps as the experts have. As it is dear, one other seed alone chooses the rate: where lesson
07 reads the table, tune_base.jsonl, direct tuning may be better than it stands there.
"""

import runpy
from pathlib import Path

NANO = runpy.run_path(str(Path(__file__).with_name("steer_by_nano.py")))


def train(task, n, lr, seed):
    """campus-base's scores."""
    return NANO["scored"]("base", task, n, lr, seed)


if __name__ == "__main__":
    NANO["table"](__file__, "base", (1e-4, 1e-3), range(10), [100], train)
