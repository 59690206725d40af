"""Lesson 03's appendix: five prompts learn the same examples and vote, over ten seeds.

    python data/lessons/03/compare_votes.py        goes on where it was stopped

A seed draws the examples. Five prompts of compare_prompts.py, at the rate that it found best, learn them from other
drawn words and in another order, each with a head of its own. `vote` is the test accuracy of the class that most of the
five name (of equal ones the first class), `mean` the mean accuracy of the five, `best` that of the one which is best on
the validation split. All of it takes eight minutes on one core.

The appendix 03b reads the table, compare_votes.jsonl.
"""

import copy
import runpy
from pathlib import Path
from statistics import fmean

import torch

import pefttutor
from pefttutor import data
from pefttutor.authoring.tables import compare, drawn, prepared

PROMPTS = runpy.run_path(str(Path(__file__).with_name("compare_prompts.py")))
MODEL, TASK, N, RATE, VOTERS = PROMPTS["MODEL"], "verdicts", 64, 3e-2, 5


def answers(model, examples):
    """(examples,) the class that the model names for each of them."""
    with torch.no_grad():
        batches = (data.collate(examples[i : i + 50]) for i in range(0, len(examples), 50))
        return torch.cat([model(**batch).logits.argmax(1) for batch in batches])


def train(_voters, _lr, seed):
    """The accuracies of the vote, of the mean of the voters, and of the one that validation prefers."""
    base, splits = prepared(MODEL, TASK)
    truth = torch.tensor([example["labels"] for example in splits["test"]])
    named, right, valid = [], [], []
    for voter in range(VOTERS):
        model, own = copy.deepcopy(base), 1000 * (voter + 1) + seed
        method = pefttutor.PromptTuning(
            num_virtual_tokens=PROMPTS["TOKENS"], init_seed=own, modules_to_save=PROMPTS["HEAD"]
        )
        method.attach(model)
        examples = drawn(MODEL, TASK, N, seed)
        pefttutor.fit(model, examples, steps=PROMPTS["STEPS"], batch_size=PROMPTS["BATCH"], lr=RATE, seed=own)
        named.append(answers(model, splits["test"]))
        right.append(float((named[-1] == truth).float().mean()))
        valid.append(pefttutor.evaluate(model, splits["validation"])["accuracy"])
    vote = float((torch.stack(named).mode(0).values == truth).float().mean())
    return {"vote": vote, "mean": fmean(right), "best": right[valid.index(max(valid))]}


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(VOTERS,): None},
        columns=("voters",),
        rates=[],
        seeds=range(10),
        search_seeds=[],
        model=MODEL,
        tasks=[TASK],
        steps=PROMPTS["STEPS"],
        batch_size=PROMPTS["BATCH"],
        tokens=PROMPTS["TOKENS"],
        rate=RATE,
    )
