"""Lesson 08: rules that choose what trains, on 16 to 256 examples of two tasks, over ten seeds.

    python data/lessons/08/compare_sizes.py        goes on where it was stopped

Every way trains campus-nano for 120 steps of 16, but for the frozen model with a head that is fitted to its end.
Head, BitFit and full fine-tuning are run at each size, the other rules at one size of each task. PaFi and "random"
train as many entries as the model has biases, and the head like all of them. A seed draws the examples, their order
and the random entries. Learning rates lie on 1, 3, 10, …: five other seeds try a way's first window at each size,
widened as long as the best mean accuracy on the validation split lies at its edge.

Lesson 08 reads the table, compare_sizes.jsonl, and runs one line again.
"""

import copy

import torch

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores
from pefttutor.parts import entries
from pefttutor.parts.ranking import largest

MODEL, HEAD, STEPS, BATCH = "campus-nano", ("score",), 120, 16
SIZES, RULES_AT = [16, 64, 256], {"verdicts": 64, "animals": 256}
RULES = {
    "norms": pefttutor.LayerNormTuning(modules_to_save=HEAD),
    "last layer": pefttutor.LastLayers(fraction=0.25, modules_to_save=HEAD),
    "BitFit": pefttutor.BitFit(modules_to_save=HEAD),
}


def masks(model, way, seed):
    """Booleans for every tensor but the head's, as many true as there are biases."""
    tensors = {name: p.detach() for name, p in entries.candidates(model, HEAD).items()}
    generator = torch.Generator().manual_seed(seed)
    score = {
        "PaFi": lambda p: -p.abs(),
        "random": lambda p: torch.rand(p.shape, generator=generator),
    }[way]
    k = sum(p.numel() for name, p in tensors.items() if name.endswith("bias"))
    return largest({name: score(p) for name, p in tensors.items()}, k)


def train(task, n, way, lr, seed):
    """Adapt campus-nano in one way to the n examples of a seed; what `scores` says of it."""
    base, splits = prepared(MODEL, task)
    model, examples = copy.deepcopy(base), drawn(MODEL, task, n, seed)
    if way == "frozen + head":
        pefttutor.fit_head(model, examples, splits["validation"])
        return scores(model, MODEL, task)
    if way in RULES:
        RULES[way].attach(model)
    elif way != "full":
        pefttutor.SparseFineTuning(modules_to_save=HEAD).attach(model, masks(model, way, seed))
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return scores(model, MODEL, task)


WINDOWS = {
    "frozen + head": None,
    "BitFit": (1e-2, 1e-1),
    "full": (3e-4, 3e-3),
    "norms": (1e-2, 1e-1),
    "last layer": (1e-3, 1e-2),
    "PaFi": (1e-2, 1e-1),
    "random": (1e-2, 1e-1),
}

if __name__ == "__main__":
    compare(
        __file__,
        train,
        {
            (task, n, way): window
            for task in RULES_AT
            for n in SIZES
            for way, window in WINDOWS.items()
            if way in ("frozen + head", "BitFit", "full") or n == RULES_AT[task]
        },
        columns=("task", "n", "way"),
        rates=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0],
        seeds=range(10),
        search_seeds=range(100, 105),
        model=MODEL,
        tasks=list(RULES_AT),
        steps=STEPS,
        batch_size=BATCH,
    )
