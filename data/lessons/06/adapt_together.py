"""Appendix 06c: the four adapters of adapt_sources.py trained together, and the model along with them (MT-A).

    python data/lessons/06/adapt_together.py        goes on where it was stopped

Each of 1,200 steps takes 16 examples of one of the four tasks, in turn, and trains that task's adapter, its head and
the whole model, which all four share: 300 steps a task, half as many as adapt_sources.py takes. The adapters' rate is
the one there, the model's a fifth of it; neither was searched. Nothing is stored, for the shared model is as large as
campus-nano: compare_together.py trains it again.

The table, adapt_together.jsonl, says what each task reaches.
"""

import copy
import runpy
from functools import cache
from pathlib import Path

import torch

import pefttutor
from pefttutor import data
from pefttutor.authoring.tables import compare, prepared, scores
from pefttutor.train.schedule import lr_factor

SOURCE = runpy.run_path(str(Path(__file__).with_name("adapt_sources.py")))
MODEL, SOURCES, BATCH, RATE = (SOURCE[name] for name in ("MODEL", "SOURCES", "BATCH", "RATE"))
STEPS, MODEL_RATE = 1200, RATE / 5


@cache
def together():
    """The body that the four tasks have trained, with their adapters, all switched off, and the heads by task."""
    body = copy.deepcopy(prepared(MODEL, SOURCES[0])[0].model)
    own, heads = list(body.parameters()), {}
    for task in SOURCES:
        pefttutor.Adapter(**SOURCE["ADAPTER"]).attach(body, name=task)
        heads[task] = copy.deepcopy(prepared(MODEL, task)[0].score)
    added = [p for name, p in body.named_parameters() if "adapter_" in name]
    added += [p for head in heads.values() for p in head.parameters()]
    optimizer = torch.optim.AdamW([{"params": own, "lr": MODEL_RATE}, {"params": added, "lr": RATE}])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, STEPS, warmup=0.06, schedule="linear")
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        task = SOURCES[step % len(SOURCES)]
        examples = prepared(MODEL, task)[1]["train"]
        chosen = torch.randint(len(examples), (BATCH,), generator=generator).tolist()
        model = with_body(pefttutor.switch(body, task), task, heads[task]).train()
        for p in own:
            p.requires_grad_(True)
        model(**data.collate([examples[i] for i in chosen])).loss.backward()
        torch.nn.utils.clip_grad_norm_([*own, *added], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return pefttutor.switch(body).eval(), heads


def with_body(body, task, head=None):
    """The classifier of a task on this body, itself and no copy, with this head or a new one."""
    model = copy.copy(prepared(MODEL, task)[0])
    model._modules = model._modules | {"model": body, "score": head or copy.deepcopy(model.score)}
    return model


def train(task, lr, seed):
    """How good the shared model is on one of the tasks, with that task's adapter and head."""
    body, heads = together()
    return scores(with_body(pefttutor.switch(body, task), task, heads[task]).eval(), MODEL, task)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(task,): None for task in SOURCES},
        columns=("task",),
        rates=[MODEL_RATE],
        seeds=[0],
        search_seeds=[],
        model=MODEL,
        tasks=SOURCES,
        steps=STEPS,
        batch_size=BATCH,
        model_rate=MODEL_RATE,
    )
