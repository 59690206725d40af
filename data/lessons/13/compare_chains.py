"""Lesson 13: twice as many steps for LoRA of rank 1, and for chains of six such LoRAs, over six seeds.

    python data/lessons/13/compare_chains.py        goes on where it was stopped

Facts, layers, batches and recall are those of compare_ways.py, the steps 240 instead of 120. ReLoRA and COLA merge
after every 40 steps; ReLoRA cuts 99.9 % of Adam's moments, the released code's share, which of a factor's 352 or 128
values leaves none, and its rate rises again over 10 steps. "rank" is the mean rank of the four changes, counting
singular values above 1/1000 of the largest one; "forgotten" is the rise of the loss on unseen text of the world.

Three other seeds try the learning rates of a first window, which is widened as long as the best mean lies at its edge.
Time allowed six test seeds instead of ten.

Lesson 13 reads the table, compare_chains.jsonl.
"""

from statistics import fmean

import torch
from compare_ways import BATCH, MODEL, SEARCH, TARGETS, TASK, before, facts, recall

import pefttutor
from pefttutor import data, models
from pefttutor.authoring.tables import compare

STEPS, LINK = 240, 40
WINDOWS = {"LoRA, r = 1": (1e-2, 5e-2), "ReLoRA, r = 1": (1e-2, 5e-2), "COLA, r = 1": (1e-2, 5e-2)}


def method(way, seed):
    """What is attached for a way."""
    how = {"r": 1, "lora_alpha": 2, "target_modules": TARGETS, "init_seed": seed}
    if way.startswith("ReLoRA"):
        return pefttutor.ReLoRA(
            reset_every=LINK, restart_warmup_steps=10, optimizer_magnitude_pruning=0.999, **how
        )
    return pefttutor.COLA(link_steps=LINK, **how) if way.startswith("COLA") else pefttutor.LoRA(**how)


def train(way, lr, seed):
    """Tell campus-nano the facts of a seed in one way; how many it recalls, and what it cost."""
    model, tokenizer = models.load(MODEL)
    examples = data.encode(facts(seed), tokenizer, kind="generation")
    method(way, seed).attach(model)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    if seed in SEARCH:
        return {"validation": recall(model, examples)}
    found = {"test": recall(model, examples), "forgotten": data.held_out_loss(model, tokenizer) - before()}
    pefttutor.merge(model)
    ranks = []
    for old, new in zip(models.load(MODEL)[0].model.layers, model.model.layers, strict=True):
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
        seeds=range(6),
        search_seeds=SEARCH,
        model=MODEL,
        tasks=[TASK],
        steps=STEPS,
        batch_size=BATCH,
    )
