"""Lesson 22: LoRA in three places, each at its own learning rate, over ten seeds of two tasks; and what it intrudes.

    python data/lessons/22/sweep_places.py        goes on where it was stopped

LoRA of rank 8 with the factor s = 2 adapts the attention's four projections, the MLP's three, or all seven, of every
block of campus-nano, and trains the new head, for 120 steps of 16. A seed draws the examples, their order and the
factors A. Five other seeds try rates on 1, 2, 5, 10, … from 0.002 to 0.05, and beyond while the best lies at an edge.
Full fine-tuning trains on the same examples at the rate that lesson 09 has found (compare_masks.jsonl), so that it has
no rate here.

`intruders` says how many of the ten leading left singular vectors of a changed matrix lie at a cosine below 0.5 from
every one that it had before, as a mean over the 28 matrices of the blocks. The ten seeds are also scored once these
directions are shrunk to three quarters ("shrunk"), and once as long a step back has been made along the whole change
of each such matrix instead ("back"). Of the five, the first two are asked what they have forgotten.

Lesson 22 reads the table, sweep_places.jsonl.
"""

import copy

import torch

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

MODEL, HEAD, STEPS, BATCH = "campus-nano", ("score",), 120, 16
CASES = [("verdicts", 64), ("animals", 256)]  # task, examples
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
PLACES = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}
WINDOW, FULL_LR = (2e-3, 5e-2), 2e-3
TOP, EPSILON, KEEP, TESTS, SEARCH = 10, 0.5, 0.75, range(10), range(100, 105)


def matrices(model):
    """The weights of the blocks' linear layers, by name."""
    layers = [(name, model.get_submodule(name)) for name, _ in model.named_modules() if name]
    return {name: layer.weight for name, layer in layers if name.split(".")[-1] in ATTENTION + MLP}


def intruding(before, after):
    """Singular triplets of `after`, and which of the leading ones are like none of `before`."""
    U0 = torch.linalg.svd(before, full_matrices=False).U
    U, sigma, Vh = torch.linalg.svd(after, full_matrices=False)
    nearest = (U[:, :TOP].T @ U0).abs().amax(dim=1)
    return U, sigma, Vh, torch.nonzero(nearest < EPSILON).flatten()


def moved(model, old, *, along):
    """A copy whose intruders are shrunk, or whose matrices go as far back along their whole change."""
    model = copy.deepcopy(model)
    for name, p in matrices(model).items():
        U, sigma, Vh, found = intruding(old[name], p.data)
        step, delta = (1 - KEEP) * (U[:, found] * sigma[found]) @ Vh[found], p.data - old[name]
        p.data -= step if along == "intruders" else delta * min(1.0, float(step.norm() / delta.norm()))
    return model


def train(task, n, way, lr, seed):
    """Adapt campus-nano in one way to the n examples of a seed; its scores and its intruders."""
    base, splits = prepared(MODEL, task)
    model, old = copy.deepcopy(base), {name: p.detach() for name, p in matrices(base).items()}
    if way != "full":
        method = pefttutor.LoRA(
            r=8, lora_alpha=16, target_modules=PLACES[way], init_seed=seed, modules_to_save=HEAD
        )
        method.attach(model)
    examples = drawn(MODEL, task, n, seed)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr or FULL_LR, seed=seed)
    if way != "full":
        pefttutor.merge(model)
    counts = [len(intruding(old[name], p.data)[3]) for name, p in matrices(model).items()]
    found = {"intruders": sum(counts) / len(counts)}
    if seed not in TESTS:
        found["validation"] = pefttutor.evaluate(model, splits["validation"])["accuracy"]
        return found | (scores(model, MODEL, task) if seed in SEARCH[:2] else {})
    found |= scores(model, MODEL, task)
    for which, along in (("shrunk", "intruders"), ("back", "change")):
        after = scores(moved(model, old, along=along), MODEL, task) if sum(counts) else found
        found |= {which: after["test"], f"{which}_forgotten": after["forgotten"]}
    return found


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*case, way): WINDOW if way in PLACES else None for case in CASES for way in (*PLACES, "full")},
        columns=("task", "n", "way"),
        rates=[1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1],
        seeds=TESTS,
        search_seeds=SEARCH,
        model=MODEL,
        tasks=[task for task, _ in CASES],
        steps=STEPS,
        batch_size=BATCH,
        r=8,
        scaling=2,
        keep=KEEP,
    )
