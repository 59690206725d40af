"""Lesson 06: four adapters, each trained alone on all examples of its own task, and saved without its head.

    python data/lessons/06/adapt_sources.py        goes on where it was stopped

Pfeiffer's place and 15 features in the middle, as in lesson 05's table; 600 steps of 16 at one rate, which wasn't
searched. A file in adapters/ holds what an adapter has learned on the body of campus-nano, so that it fits whatever
head stands on it. compare_fusions.py and lesson 06 load these files.

The table, adapt_sources.jsonl, says what each reaches on its own task.
"""

import copy
from pathlib import Path

import pefttutor
from pefttutor.authoring.tables import compare, prepared, scores

MODEL, STEPS, BATCH, RATE = "campus-nano", 600, 16, 5e-3
SOURCES, ADAPTER = ("sentiment", "guests", "most", "topic"), {"placement": "pfeiffer", "bottleneck": 15}
FOLDER = Path(__file__).with_name("adapters")


def train(task, lr, seed):
    """Train the adapter of one task, save it, and say how good it is there."""
    base, splits = prepared(MODEL, task)
    model = copy.deepcopy(base)
    pefttutor.Adapter(**ADAPTER, init_seed=seed).attach(model.model, name=task)
    pefttutor.fit(model, splits["train"], steps=STEPS, batch_size=BATCH, lr=RATE, seed=seed)
    pefttutor.save(model.model, FOLDER / task)
    return scores(model, MODEL, task)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(task,): None for task in SOURCES},
        columns=("task",),
        rates=[RATE],
        seeds=[0],
        search_seeds=[],
        model=MODEL,
        tasks=SOURCES,
        steps=STEPS,
        batch_size=BATCH,
    )
