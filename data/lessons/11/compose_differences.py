"""Lesson 11: add a language's difference to a task's, dense or sparse, over ten seeds. What is left of each?

    python data/lessons/11/compose_differences.py        after choose_rates.py; goes on where it was stopped

The language is Velan, learnt by campus-nano as a language model; the task is verdicts, in English. Each is learnt by
LT-SFT, at the rates that choose_rates.py has found: its first phase gives the dense difference, its second the sparse
one. A third difference, "short", is a dense one of the language that stops as soon as its perplexity isn't above the
sparse one's: the two know about as much of the language. A seed draws the examples and their order. Lesson 11 reads the
table, compose_differences.jsonl.
"""

import copy
import math
import runpy
from pathlib import Path

import torch

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, read, searched
from pefttutor.selective.lt_sft import add_differences, difference

CHOICE = runpy.run_path(str(Path(__file__).with_name("choose_rates.py")))
MODEL, HEAD, TASK, SETTINGS = (CHOICE[name] for name in ("MODEL", "HEAD", "TASK", "SETTINGS"))
SHORT_STRIDE = 4


def chosen_rates():
    """(rate of the first phase, rate of the second) for the task and for the language."""
    found = searched(*read("11/choose_rates.jsonl"))
    return {what: max(tried, key=lambda rates: tried[rates]) for (what,), tried in found.items()}


def dense(model, start):
    """θ₁ − θ₀ at every entry, in the form of `difference`."""
    before = dict(start.named_parameters())
    return {
        name: (torch.arange(p.numel()), (p.detach() - before[name].detach()).flatten())
        for name, p in model.named_parameters()
        if not name.startswith(HEAD)
    }


def learnt(start, examples, what, rates, seed, head=()):
    """The dense and the sparse difference, and the models that they come from."""
    first, second = CHOICE["lottery"](start, examples, SETTINGS[what], rates[what], seed, head)
    return {"dense": (dense(first, start), first), "sparse": (difference(second, start), second)}


def train(_way, _lr, seed):
    """What is left of the task and of the language, by name."""
    rates, (speaker, texts) = chosen_rates(), CHOICE["velan"]()
    classifier, splits = prepared(MODEL, TASK)
    heard = texts["test"][:60]

    def perplexity(model):
        return math.exp(pefttutor.evaluate(model, heard, batch_size=32)["loss"])

    examples = drawn(MODEL, TASK, SETTINGS["task"]["examples"], seed)
    tasks = learnt(classifier, examples, "task", rates, seed, HEAD)
    languages = learnt(speaker, texts["train"], "language", rates, seed)
    known = {name: perplexity(model) for name, (_, model) in languages.items()}
    for steps in range(SHORT_STRIDE, SETTINGS["language"]["steps"], SHORT_STRIDE):
        short = copy.deepcopy(speaker).requires_grad_(True)
        pefttutor.fit(short, texts["train"], steps=steps, batch_size=16, lr=rates["language"][0], seed=seed)
        known["short"] = perplexity(short)
        if known["short"] <= known["sparse"]:
            break
    languages["short"] = (dense(short, speaker), short)
    found = {"perplexity of Velan, before": perplexity(speaker), "steps of short": steps}
    for name, value in known.items():
        found[f"perplexity of Velan, {name}"] = value
    for kind, (phi, model) in tasks.items():
        found[f"accuracy, {kind} task"] = pefttutor.evaluate(model, splits["test"])["accuracy"]
        for name, (other, _) in languages.items():
            both = add_differences(copy.deepcopy(classifier), phi, other)
            both.score.load_state_dict(model.score.state_dict())
            accuracy = pefttutor.evaluate(both, splits["test"])["accuracy"]
            found[f"accuracy, {kind} task + {name} language"] = accuracy
            heard_by = add_differences(copy.deepcopy(speaker), phi, other)
            found[f"perplexity of Velan, {kind} task + {name} language"] = perplexity(heard_by)
    return found


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {("LT-SFT",): None},
        columns=("way",),
        rates=[],
        seeds=range(10),
        search_seeds=[],
        model=MODEL,
        tasks=[TASK, "velan_text"],
        settings=SETTINGS,
        chosen_rates=chosen_rates(),
    )
