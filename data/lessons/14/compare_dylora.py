"""Lesson 14: one training that is scored at rank 1, 2, 4 and 8, on few examples of two tasks, over ten seeds.

    python data/lessons/14/compare_dylora.py        goes on where it was stopped

DyLoRA of rank 8 adapts q_proj and v_proj of campus-nano with the scale 16/b for a rank b, and trains the new head, for
120 steps of 16; a step trains all b directions of the rank that it draws. "LoRA, cut" is lesson 12's LoRA of rank 8 at
the rate which its search chose there, trained once and cut by singular values to 4, 2 and 1 directions a layer: it has
no search of its own.

A seed draws the examples, their order, the factors A and the ranks. Learning rates lie on 1, 2, 5, 10, …: five other
seeds try the first window, which is widened as long as the best lies at its edge. The search, for which one
training serves every rank, looks at the mean of the validation accuracies at the four ranks. The columns test1, test2,
… are the test accuracies at each; test is that at rank 8.

Appendix 14b reads the table, compare_dylora.jsonl. LoRA trained at rank 1 and at rank 8 stands in compare_ranks.jsonl
of lesson 12.
"""

import copy
from contextlib import nullcontext
from statistics import fmean

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores
from pefttutor.data.evaluation import evaluate
from pefttutor.widgets.spectrum import truncated, updates

MODEL, STEPS, BATCH, RANKS = "campus-nano", 120, 16, (1, 2, 4, 8)
CASES, SEARCH = (
    {("animals", 256): 1e-2, ("verdicts", 64): 2e-2},
    range(100, 105),
)  # the rate of LoRA of rank 8


def train(task, n, way, lr, seed):
    """Adapt campus-nano to the n examples of a seed; what `scores` says of it, and its accuracies at each rank."""
    model = copy.deepcopy(prepared(MODEL, task)[0])
    how = {"r": 8, "lora_alpha": 16, "init_seed": seed, "modules_to_save": ("score",)}
    method = pefttutor.DyLoRA(**how, frozen=False) if way == "DyLoRA" else pefttutor.LoRA(**how)
    method.attach(model)
    lr = CASES[task, n] if lr is None else lr
    pefttutor.fit(model, drawn(MODEL, task, n, seed), steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    splits, at, searching = prepared(MODEL, task)[1], {}, seed in SEARCH
    found = scores(model, MODEL, task, searching=searching)
    for k in RANKS:
        if way == "DyLoRA":
            method.use_rank(model, k)
        with nullcontext() if way == "DyLoRA" else truncated(model, updates(model), k):
            for split in ("validation",) if searching else ("validation", "test"):
                at[f"{split}{k}"] = evaluate(model, splits[split])["accuracy"]
    return found | at | {"validation": fmean(at[f"validation{k}"] for k in RANKS)}


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {
            (*case, way): window
            for case in CASES
            for way, window in (("DyLoRA", (1e-2, 2e-2)), ("LoRA, cut", None))
        },
        columns=("task", "n", "way"),
        rates=[1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1],
        seeds=range(10),
        search_seeds=SEARCH,
        model=MODEL,
        tasks=[task for task, _ in CASES],
        steps=STEPS,
        batch_size=BATCH,
    )
