"""Lesson 13: 24 facts in campus-nano's four down_proj, by ways of one budget and of three ranks, over ten seeds.

    python data/lessons/13/compare_ways.py        goes on where it was stopped

A seed draws 24 people of the task memory, each in one of the sentences in which the training split tells the password,
their order, and what starts at random. All train for 120 steps of 8, 40 passes. LoRA of rank 1, MELoRA of 8 small
LoRAs of rank 1 and MoRA's type 1 have 1,920 to 1,936 values, LoRA of rank 8 has eight times as many, and "full" trains
everything. LoRA and MELoRA have the factor α/r = 2. The score is recall: the share of these sentences that the model
ends right, token by token, every token being its first choice. Nothing new is asked, for facts can't be guessed.

Three other seeds, which draw from the 40 people whom the validation split asks about, try the learning rates of a first
window on 1, 2, 5, 10, …, which is widened as long as the best mean lies at its edge; the ten seeds draw from the other
120 people. "rank" is the mean rank of the four changes, counting singular values above 1/1000 of the largest one;
"forgotten" is the rise of the loss on unseen text of the model's world.

Lesson 13 reads the table, compare_ways.jsonl.
"""

import copy
import re
from functools import cache
from statistics import fmean

import torch

import pefttutor
from pefttutor import data, models
from pefttutor.authoring.tables import compare

MODEL, TASK, N, STEPS, BATCH = "campus-nano", "memory", 24, 120, 8
SEARCH, TARGETS = range(100, 103), ("down_proj",)
WINDOWS = {
    "LoRA, r = 1": (1e-2, 5e-2),
    "MoRA, r = 1": (1e-2, 5e-2),
    "MELoRA, r = 1, n = 8": (2e-2, 1e-1),
    "LoRA, r = 8": (1e-2, 5e-2),
    "full": (5e-4, 2e-3),
}


def person(prompt):
    """The two names in a sentence of the task: "What Ann Hill whispers at the gate:" → "Ann Hill"."""
    return re.search(r"([A-Z]\w+ [A-Z]\w+) (is|says|whispers|gives)", prompt)[1]


def facts(seed):
    """The 24 sentences of a seed, as rows with prompt and answer."""
    splits = data.load(TASK)
    told = {}
    for row in splits["train"]:
        told.setdefault(person(row["prompt"]), row)  # the first of each person's three
    asked = {person(row["prompt"]) for row in splits["validation"]}
    pool = [row for name, row in told.items() if (name in asked) == (seed in SEARCH)]
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return [pool[i] for i in order[:N].tolist()]


@torch.no_grad()
def recall(model, examples):
    """The share of sentences whose every label is the model's first choice."""
    batch = data.collate(examples)
    labels = batch["labels"][:, 1:]
    hit = model.eval()(**batch).logits[:, :-1].argmax(-1) == labels
    return (hit | (labels == -100)).all(-1).float().mean().item()


@cache
def before():
    """The base's loss on the world's unseen text."""
    return data.held_out_loss(*models.load(MODEL))


def method(way, seed):
    """What is attached for a way."""
    how = {"target_modules": TARGETS}
    if way.startswith("LoRA"):
        r = int(way.split()[-1])
        return pefttutor.LoRA(r=r, lora_alpha=2 * r, init_seed=seed, **how)
    if way.startswith("MELoRA"):
        return pefttutor.MELoRA(r=1, n=8, lora_alpha=2, init_seed=seed, **how)
    return pefttutor.MoRA(r=1, mora_type=1, **how)


def train(way, lr, seed):
    """Tell campus-nano the facts of a seed in one way; how many it recalls, and what it cost."""
    model, tokenizer = models.load(MODEL)
    base = copy.deepcopy(model)
    examples = data.encode(facts(seed), tokenizer, kind="generation")
    if way != "full":
        method(way, seed).attach(model)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    if seed in SEARCH:
        return {"validation": recall(model, examples)}
    found = {"test": recall(model, examples)}
    found["forgotten"] = data.held_out_loss(model, tokenizer) - before()
    if way != "full":
        pefttutor.merge(model)
    ranks = []
    for old, new in zip(base.model.layers, model.model.layers, strict=True):
        sigma = torch.linalg.svdvals((new.mlp.down_proj.weight - old.mlp.down_proj.weight).detach())
        ranks.append(float((sigma > 1e-3 * sigma[0]).sum()))
    return found | {"rank": fmean(ranks)}


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(way,): window for way, window in WINDOWS.items()},
        columns=("way",),
        rates=[1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1],
        seeds=range(10),
        search_seeds=SEARCH,
        model=MODEL,
        tasks=[TASK],
        steps=STEPS,
        batch_size=BATCH,
    )
