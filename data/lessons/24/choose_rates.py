"""Lesson 24: the learning rates at which a task and a language are learnt, densely and by LT-SFT, on five seeds.

    python data/lessons/24/choose_rates.py        goes on where it was stopped

The task is verdicts, with the new head and, by LT-SFT, 5 % of campus-nano's entries; the language is Velan, with 20 %.
Dense is full fine-tuning, in as many steps as each of LT-SFT's two phases has. All rates of a window are tried (of both
phases all pairs) by five seeds, which aren't those of compose_differences.py, as long as the best lies at an edge of
its window. The best has the highest accuracy on the validation split, or the lowest loss there.

compose_differences.py reads the table, choose_rates.jsonl.
"""

import copy
from functools import cache

import pefttutor
from pefttutor import data, models
from pefttutor.authoring.tables import compare, drawn, prepared

MODEL, HEAD, TASK = "campus-nano", ("score",), "verdicts"
SETTINGS = {
    "task": {"examples": 256, "steps": 60, "fraction": 0.05},
    "language": {"examples": 1000, "steps": 60, "fraction": 0.2, "max_length": 64},
}
WINDOWS = {
    ("task", "dense"): (None, (3e-4, 3e-3)),
    ("task", "sparse"): ((1e-4, 1e-3), (3e-3, 3e-2)),
    ("language", "dense"): (None, (3e-3, 3e-2)),
    ("language", "sparse"): ((3e-3, 3e-2), (3e-2, 3e-1)),
}


@cache
def velan():
    """campus-nano as a language model, and encoded texts in Velan."""
    speaker, words = models.load(MODEL)
    splits = data.load("velan_text")
    length = SETTINGS["language"]["max_length"]
    return speaker, {name: data.encode(split, words, max_length=length) for name, split in splits.items()}


def start_and_examples(what, seed):
    """The model that learns, what it learns from, and the splits."""
    if what == "task":
        start, splits = prepared(MODEL, TASK)
        return start, drawn(MODEL, TASK, SETTINGS["task"]["examples"], seed), splits
    start, splits = velan()
    return start, splits["train"], splits


def dense(start, examples, lr, seed, steps):
    """The model after full fine-tuning."""
    model = copy.deepcopy(start).requires_grad_(True)
    pefttutor.fit(model, examples, steps=steps, batch_size=16, lr=lr, seed=seed)
    return model


def sparse(start, examples, rates, seed, *, steps, fraction, head=()):
    """The model after both phases of LT-SFT."""
    model = copy.deepcopy(start)
    method = pefttutor.LTSFT(fraction=fraction, modules_to_save=head)
    method.attach(model)
    pefttutor.fit(model, examples, steps=steps, batch_size=16, lr=rates[0], seed=seed)
    method.rewind(model)
    pefttutor.fit(model, examples, steps=steps, batch_size=16, lr=rates[1], seed=seed)
    return model


def learnt(what, way, rates, seed):
    """The model that has learnt the task or the language."""
    settings = SETTINGS[what]
    start, examples, _ = start_and_examples(what, seed)
    if way == "dense":
        return dense(start, examples, rates[1], seed, settings["steps"])
    head = HEAD if what == "task" else ()
    return sparse(
        start, examples, rates, seed, steps=settings["steps"], fraction=settings["fraction"], head=head
    )


def train(what, way, first_lr, lr, seed):
    """How good it is on the validation split."""
    model = learnt(what, way, (first_lr, lr), seed)
    validation = start_and_examples(what, seed)[2]["validation"]
    if what == "task":
        return {"validation": pefttutor.evaluate(model, validation)["accuracy"]}
    return {"validation": -pefttutor.evaluate(model, validation, batch_size=32)["loss"]}


if __name__ == "__main__":
    compare(
        __file__,
        train,
        WINDOWS,
        columns=("what", "way"),
        phases=("first_lr", "lr"),
        rates=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1],
        seeds=[],
        search_seeds=range(100, 105),
        model=MODEL,
        tasks=[TASK, "velan_text"],
        settings=SETTINGS,
    )
