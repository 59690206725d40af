"""Lesson 07: campus-small tuned directly, and campus-base steered by it, over the same ten seeds.

    python data/lessons/07/tune_small.py        goes on where it was stopped

Every weight, in as many steps and on the same examples as steer_by_nano.py tunes campus-nano. One other seed alone
chooses the rate, by what small says itself: direct tuning may be better than it stands here, and so may the steering.
Lesson 07 reads the table, tune_small.jsonl.
"""

import runpy
from pathlib import Path

from pefttutor.authoring.tables import compare

NANO = runpy.run_path(str(Path(__file__).with_name("steer_by_nano.py")))


def train(task, n, lr, seed):
    """campus-small's scores, and those of campus-base steered by it."""
    return NANO["scored"]("small", task, n, lr, seed)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        dict.fromkeys(NANO["CASES"], (1e-4, 1e-3)),
        columns=("task", "n"),
        rates=NANO["RATES"],
        seeds=range(10),
        search_seeds=[100],
        model="campus-small",
        tasks=[*(task for task, _ in NANO["CASES"]), "world_text"],
        steps=NANO["STEPS"],
        batch_size=NANO["BATCH"],
        alphas=NANO["ALPHAS"],
        looked_at=NANO["LOOKED_AT"] | {"world_text": NANO["WORLD"]},
    )
