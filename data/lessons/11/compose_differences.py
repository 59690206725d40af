"""Lesson 11: add a language's difference to a task's, dense or sparse, over five seeds. What is left of each?

    python data/lessons/11/compose_differences.py        about 4 minutes on a quiet core; goes on where it was stopped

The language is Velan, learnt by campus-nano as a language model; the task is sentiment, in English. Each is learnt by
LT-SFT: its first phase gives the dense difference, its second the sparse one. A third difference, "short", is a dense
one of the language that stops as soon as its perplexity isn't above the sparse one's: the two know about as much of the
language. A seed is that of the order of training. Lesson 11 reads the table, compose_differences.jsonl.
"""

import copy
import math
from pathlib import Path

import torch

import pefttutor
from pefttutor import data, models
from pefttutor.authoring.tables import Table, provenance
from pefttutor.selective.lt_sft import add_differences, difference

MODEL, HEAD = "campus-nano", ("score",)
TASK = {"examples": 800, "steps": 100, "fraction": 0.05, "lr": 1e-2}
LANGUAGE = {"examples": 1000, "steps": 60, "fraction": 0.2, "lr": 3e-3, "max_length": 64}
FIRST_LR, SHORT_STRIDE = 1e-3, 4
SEEDS = list(range(5))


def dense(model, start):
    """θ₁ − θ₀ at every entry, in the form of `difference`."""
    before = dict(start.named_parameters())
    return {
        name: (torch.arange(p.numel()), (p.detach() - before[name].detach()).flatten())
        for name, p in model.named_parameters()
        if not name.startswith(HEAD)
    }


def lottery(start, examples, settings, seed, head=()):
    """The dense and the sparse difference, and the models that they come from."""
    model, method = (
        copy.deepcopy(start),
        pefttutor.LTSFT(fraction=settings["fraction"], modules_to_save=head),
    )
    method.attach(model)
    pefttutor.fit(model, examples, steps=settings["steps"], lr=FIRST_LR, seed=seed)
    first = copy.deepcopy(model)
    method.rewind(model)
    pefttutor.fit(model, examples, steps=settings["steps"], lr=settings["lr"], seed=seed)
    return {"dense": (dense(first, start), first), "sparse": (difference(model, start), model)}


def row(seed):
    task, texts = data.load("sentiment"), data.load("velan_text")
    labels = list(data.info("sentiment").labels)
    classifier, words = models.load(MODEL, head="classification", labels=labels)
    speaker, _ = models.load(MODEL)
    reviews = data.encode(task["train"].select(range(TASK["examples"])), words)
    unseen = data.encode(task["test"], words)
    velan = data.encode(texts["train"], words, max_length=LANGUAGE["max_length"])
    heard = data.encode(texts["test"].select(range(60)), words, max_length=LANGUAGE["max_length"])

    def perplexity(model):
        return math.exp(pefttutor.evaluate(model, heard, batch_size=32)["loss"])

    tasks = lottery(classifier, reviews, TASK, seed, HEAD)
    languages = lottery(speaker, velan, LANGUAGE, seed)
    known = {name: perplexity(model) for name, (_, model) in languages.items()}
    for steps in range(SHORT_STRIDE, LANGUAGE["steps"], SHORT_STRIDE):
        short = copy.deepcopy(speaker).requires_grad_(True)
        pefttutor.fit(short, velan, steps=steps, lr=FIRST_LR, seed=seed)
        known["short"] = perplexity(short)
        if known["short"] <= known["sparse"]:
            break
    languages["short"] = (dense(short, speaker), short)
    found = {"perplexity of Velan, before": perplexity(speaker), "steps of short": steps}
    for name, value in known.items():
        found[f"perplexity of Velan, {name}"] = value
    for kind, (phi, model) in tasks.items():
        found[f"accuracy, {kind} task"] = pefttutor.evaluate(model, unseen)["accuracy"]
        for name, (other, _) in languages.items():
            both = add_differences(copy.deepcopy(classifier), phi, other)
            both.score.load_state_dict(model.score.state_dict())
            found[f"accuracy, {kind} task + {name} language"] = pefttutor.evaluate(both, unseen)["accuracy"]
            heard_by = add_differences(copy.deepcopy(speaker), phi, other)
            found[f"perplexity of Velan, {kind} task + {name} language"] = perplexity(heard_by)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    script = Path(__file__)
    header = provenance(
        script, model=MODEL, tasks=["sentiment", "velan_text"], task=TASK, language=LANGUAGE, seeds=SEEDS
    )
    table = Table(script.with_suffix(".jsonl"), header, ("seed",), row)
    for seed in SEEDS:
        table[(seed,)]
