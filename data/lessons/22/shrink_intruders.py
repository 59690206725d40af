"""Lesson 22: intruder dimensions of LoRA and of full fine-tuning, and LoRA's shrunk, over ten seeds of two tasks.

    python data/lessons/22/shrink_intruders.py        goes on where it was stopped

LoRA of rank 8 with the factor α/r = 2 adapts q_proj and v_proj of campus-nano and trains the new head, at the rate that
lesson 12 has found for it (compare_ranks.jsonl); full fine-tuning trains at lesson 09's (compare_masks.jsonl); both for
120 steps of 16, on the same examples as there.

An intruder is one of the ten leading left singular vectors of a changed matrix that lies at a cosine below 0.5 from
every one that the matrix had before. `intruders` is how many there are on average in the query and value matrices,
`elsewhere` in the blocks' other five, which LoRA leaves alone. LoRA's intruders are shrunk to three quarters, as HF
PEFT does ("shrunk"); and in its place every such matrix goes back along its whole change as far as the shrinking has
moved it ("back"). Of each the test accuracy and the forgetting are kept.

Lesson 22 reads the table, shrink_intruders.jsonl.
"""

import copy
from statistics import fmean

import torch

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

MODEL, HEAD, STEPS, BATCH = "campus-nano", ("score",), 120, 16
RATES = {
    ("animals", "LoRA"): 1e-2,
    ("verdicts", "LoRA"): 2e-2,
    ("animals", "full"): 2e-3,
    ("verdicts", "full"): 2e-3,
}
CASES, TOP, EPSILON, KEEP = [("animals", 256), ("verdicts", 64)], 10, 0.5, 0.75
ADAPTED, OTHERS = ("q_proj", "v_proj"), ("k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def weights(model, kinds):
    """The weights of the blocks' layers of these kinds, by name."""
    layers = {name: layer for name, layer in model.named_modules() if name.split(".")[-1] in kinds}
    return {name: layer.weight for name, layer in layers.items()}


def intruding(before, after):
    """The singular triplets of `after`, and which of the leading ones are like none of `before`."""
    U0 = torch.linalg.svd(before, full_matrices=False).U
    U, sigma, Vh = torch.linalg.svd(after, full_matrices=False)
    nearest = (U[:, :TOP].T @ U0).abs().amax(dim=1)
    return U, sigma, Vh, torch.nonzero(nearest < EPSILON).flatten()


def moved(model, old, *, along):
    """A copy whose intruders are shrunk, or whose matrices go as far back along their whole change."""
    model = copy.deepcopy(model)
    for name, p in weights(model, ADAPTED).items():
        U, sigma, Vh, found = intruding(old[name], p.data)
        step, change = (1 - KEEP) * (U[:, found] * sigma[found]) @ Vh[found], p.data - old[name]
        p.data -= step if along == "intruders" else change * min(1.0, float(step.norm() / change.norm()))
    return model


def train(task, n, way, _, seed):
    """Adapt campus-nano in one way to the n examples of a seed; its intruders, and LoRA's scores without them."""
    base = prepared(MODEL, task)[0]
    model, old = copy.deepcopy(base), weights(base, ADAPTED + OTHERS)
    if way == "LoRA":
        pefttutor.LoRA(r=8, lora_alpha=16, init_seed=seed, modules_to_save=HEAD).attach(model)
    examples = drawn(MODEL, task, n, seed)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=RATES[task, way], seed=seed)
    if way == "LoRA":
        pefttutor.merge(model)
    with torch.no_grad():
        found = {
            name: fmean(len(intruding(old[path], p)[3]) for path, p in weights(model, kinds).items())
            for name, kinds in {"intruders": ADAPTED, "elsewhere": OTHERS}.items()
        }
    if way == "full":
        return found
    found |= scores(model, MODEL, task)
    for which, along in (("shrunk", "intruders"), ("back", "change")):
        after = scores(moved(model, old, along=along), MODEL, task)
        found |= {which: after["test"], f"{which}_forgotten": after["forgotten"]}
    return found


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*case, way): None for way in ("LoRA", "full") for case in CASES},
        columns=("task", "n", "way"),
        rates=[],
        seeds=range(10),
        search_seeds=[],
        model=MODEL,
        tasks=[task for task, _ in CASES],
        steps=STEPS,
        batch_size=BATCH,
        top=TOP,
        epsilon=EPSILON,
        keep=KEEP,
    )
