"""Lesson 13: 24 facts in campus-nano's four down_proj, by ways of one budget and of several ranks, over ten seeds.

    python data/lessons/13/compare_ways.py        goes on where it was stopped

A seed draws 24 people of the task memory, each in one of the sentences in which the training split tells the password,
their order, and what starts at random. Training takes 120 steps of 8, which are 40 passes, or 240. LoRA of rank 1 has
1,920 values, and so have MELoRA of n small LoRAs of rank 1 and the chains ReLoRA and COLA; MoRA's type 1 has 1,936,
LoRA of rank 8 eight times as many, and "full" trains everything. The factor α/r is 2. A chain merges six times, after
every 20 steps or 40, and the rate of ReLoRA then rises again over a quarter of them; it cuts 90 % of Adam's moments,
which is the package's default. The score is recall: the share of these sentences that the model ends right, token by
token, every token being its first choice. Nothing new is asked, for facts can't be guessed.

Five other seeds, which draw from the 40 people whom the validation split asks about, try the learning rates of a first
window on 1, 2, 5, 10, …, which is widened as long as the best mean lies at its edge; the ten seeds draw from the other
120 people. "rank" is the mean rank of the four changes, counting singular values above 1/1000 of the largest one;
"forgotten" is the rise of the loss on unseen text of the model's world.

Lesson 13 and its appendix 13b read the table, compare_ways.jsonl.
"""

import copy
import re
from functools import cache
from statistics import fmean

import torch

import pefttutor
from pefttutor import data, models
from pefttutor.authoring.tables import compare

MODEL, TASK, N, BATCH = "campus-nano", "memory", 24, 8
SEARCH, TARGETS = range(100, 105), ("down_proj",)
CASES = {
    (120, "LoRA, r = 1"): (1e-2, 5e-2),
    (120, "MELoRA, n = 2"): (1e-2, 5e-2),
    (120, "MELoRA, n = 4"): (2e-2, 1e-1),
    (120, "MELoRA, n = 8"): (2e-2, 1e-1),
    (120, "MoRA"): (1e-2, 5e-2),
    (120, "ReLoRA, r = 1"): (1e-2, 5e-2),
    (120, "COLA, r = 1"): (1e-2, 5e-2),
    (120, "LoRA, r = 8"): (1e-2, 5e-2),
    (120, "full"): (5e-4, 2e-3),
    (240, "LoRA, r = 1"): (1e-2, 5e-2),
    (240, "ReLoRA, r = 1"): (1e-2, 5e-2),
    (240, "COLA, r = 1"): (1e-2, 5e-2),
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


def method(steps, way, seed):
    """What is attached for a way; nothing for full fine-tuning."""
    name, number = way.split(",")[0], way.split()[-1]
    r = int(number) if name == "LoRA" else 1
    how = {"r": r, "lora_alpha": 2 * r, "target_modules": TARGETS, "init_seed": seed}
    match name:
        case "LoRA":
            return pefttutor.LoRA(**how)
        case "MELoRA":
            return pefttutor.MELoRA(n=int(number), **how)
        case "MoRA":
            return pefttutor.MoRA(r=r, mora_type=1, target_modules=TARGETS)
        case "ReLoRA":
            return pefttutor.ReLoRA(reset_every=steps // 6, restart_warmup_steps=steps // 24, **how)
        case "COLA":
            return pefttutor.COLA(link_steps=steps // 6, **how)


@cache
def start():
    """campus-nano, its tokenizer, and its loss on the world's unseen text."""
    model, tokenizer = models.load(MODEL)
    return model, tokenizer, data.held_out_loss(model, tokenizer)


def train(steps, way, lr, seed):
    """Tell campus-nano the facts of a seed in one way; how many it recalls, what it cost, and the rank."""
    base, tokenizer, before = start()
    model = copy.deepcopy(base)
    examples = data.encode(facts(seed), tokenizer, kind="generation")
    if way != "full":
        method(steps, way, seed).attach(model)
    pefttutor.fit(model, examples, steps=steps, batch_size=BATCH, lr=lr, seed=seed)
    if seed in SEARCH:
        return {"validation": recall(model, examples)}
    found = {"test": recall(model, examples), "forgotten": data.held_out_loss(model, tokenizer) - before}
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
        CASES,
        columns=("steps", "way"),
        rates=[1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1],
        seeds=range(10),
        search_seeds=SEARCH,
        model=MODEL,
        tasks=[TASK],
        batch_size=BATCH,
    )
