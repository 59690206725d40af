"""Lesson 11: the learning rates of LT-SFT's two phases, for a task in English and for a language, on five seeds.

    python data/lessons/11/choose_rates.py        goes on where it was stopped

The task is verdicts, with the new head and 5 % of campus-nano's entries; the language is Velan, with 20 %. All pairs of
rates of both phases are tried by five seeds, which aren't those of compose_differences.py, as long as the best lies at
an edge of its window. The best has the highest accuracy on the validation split, or the lowest loss there.

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


@cache
def velan():
    """campus-nano as a language model, and encoded texts in Velan."""
    speaker, words = models.load(MODEL)
    splits = data.load("velan_text")
    length = SETTINGS["language"]["max_length"]
    return speaker, {name: data.encode(split, words, max_length=length) for name, split in splits.items()}


def lottery(start, examples, settings, rates, seed, head=()):
    """The model after LT-SFT's first phase, and after its second."""
    model = copy.deepcopy(start)
    method = pefttutor.LTSFT(fraction=settings["fraction"], modules_to_save=head)
    method.attach(model)
    pefttutor.fit(model, examples, steps=settings["steps"], batch_size=16, lr=rates[0], seed=seed)
    first = copy.deepcopy(model)
    method.rewind(model)
    pefttutor.fit(model, examples, steps=settings["steps"], batch_size=16, lr=rates[1], seed=seed)
    return first, model


def train(what, first_lr, lr, seed):
    """How good the second phase's model is on the validation split."""
    settings = SETTINGS[what]
    if what == "task":
        start, splits = prepared(MODEL, TASK)
        examples = drawn(MODEL, TASK, settings["examples"], seed)
        model = lottery(start, examples, settings, (first_lr, lr), seed, HEAD)[1]
        return {"validation": pefttutor.evaluate(model, splits["validation"])["accuracy"]}
    speaker, splits = velan()
    model = lottery(speaker, splits["train"], settings, (first_lr, lr), seed)[1]
    return {"validation": -pefttutor.evaluate(model, splits["validation"], batch_size=32)["loss"]}


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {("task",): ((3e-4, 3e-3), (3e-3, 3e-2)), ("language",): ((3e-4, 3e-3), (1e-3, 1e-2))},
        columns=("what",),
        phases=("first_lr", "lr"),
        rates=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1],
        seeds=[],
        search_seeds=range(100, 105),
        model=MODEL,
        tasks=[TASK, "velan_text"],
        settings=SETTINGS,
    )
