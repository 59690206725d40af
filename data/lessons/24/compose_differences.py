"""Lesson 24: add a language's difference to a task's, dense or sparse, over ten seeds. What is left of each?

    python data/lessons/24/compose_differences.py        after choose_rates.py; goes on where it was stopped

The language is Velan, learnt by campus-nano as a language model; the task is verdicts, in English. Each is learnt by
full fine-tuning, which gives its dense difference, and by LT-SFT, which gives its sparse one, each way and phase at the
rate that choose_rates.py has found. A third difference, "short", is a dense one of the language after as few steps (by
fours) as leave its perplexity no higher than the sparse one's: the two know about as much of the language. A seed draws
the examples and their order. Lesson 24 reads the table, compose_differences.jsonl.
"""

import copy
import math
import runpy
from pathlib import Path

import torch

import pefttutor
from pefttutor.authoring.tables import compare, read, searched
from pefttutor.selective.lt_sft import add_differences, difference

CHOICE = runpy.run_path(str(Path(__file__).with_name("choose_rates.py")))
MODEL, HEAD, TASK, SETTINGS = (CHOICE[name] for name in ("MODEL", "HEAD", "TASK", "SETTINGS"))
SHORT_STRIDE = 4


def chosen_rates():
    """(rate of the first phase, rate of the second), or (None, rate), by what is learnt and how."""
    found = searched(*read("24/choose_rates.jsonl"))
    return {" ".join(case): max(tried, key=lambda rates: tried[rates]) for case, tried in found.items()}


def everywhere(model, start):
    """θ₁ − θ₀ at every entry but the new head's, in the form of `difference`."""
    before = dict(start.named_parameters())
    return {
        name: (torch.arange(p.numel()), (p.detach() - before[name].detach()).flatten())
        for name, p in model.named_parameters()
        if not name.startswith(HEAD)
    }


def train(_way, _lr, seed):
    """What is left of the task and of the language, by name."""
    rates, (speaker, texts) = chosen_rates(), CHOICE["velan"]()
    classifier, _, splits = CHOICE["start_and_examples"]("task", seed)
    heard = texts["test"][:60]

    def perplexity(model):
        return math.exp(pefttutor.evaluate(model, heard, batch_size=32)["loss"])

    learnt = {
        (what, way): CHOICE["learnt"](what, way, rates[f"{what} {way}"], seed)
        for what in ("task", "language")
        for way in ("dense", "sparse")
    }
    known = {way: perplexity(learnt["language", way]) for way in ("dense", "sparse")}
    # The fewest steps that suffice, by halving.
    few, enough = 0, SETTINGS["language"]["steps"] // SHORT_STRIDE
    short, known["short"] = learnt["language", "dense"], known["dense"]
    while enough - few > 1:
        middle = (few + enough) // 2
        tried = CHOICE["dense"](
            speaker, texts["train"], rates["language dense"][1], seed, middle * SHORT_STRIDE
        )
        if (value := perplexity(tried)) <= known["sparse"]:
            enough, short, known["short"] = middle, tried, value
        else:
            few = middle
    steps = enough * SHORT_STRIDE
    found = {"perplexity of Velan, before": perplexity(speaker), "steps of short": steps}
    found |= {f"perplexity of Velan, {way}": value for way, value in known.items()}
    languages = {
        "dense": everywhere(learnt["language", "dense"], speaker),
        "sparse": difference(learnt["language", "sparse"], speaker),
        "short": everywhere(short, speaker),
    }
    tasks = {
        "dense": everywhere(learnt["task", "dense"], classifier),
        "sparse": difference(learnt["task", "sparse"], classifier),
    }
    for kind, phi in tasks.items():
        model = learnt["task", kind]
        found[f"accuracy, {kind} task"] = pefttutor.evaluate(model, splits["test"])["accuracy"]
        for name, other in languages.items():
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
