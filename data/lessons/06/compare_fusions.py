"""Lesson 06: four adapters of other tasks fused for a small target task, over ten seeds of two targets.

    python data/lessons/06/compare_fusions.py        after adapt_sources.py; goes on where it was stopped

The adapters of sentiment, guests, most and topic are frozen; Q, K, V and a new head train, for 120 steps of 16. Ways:

fusion      the four
own too     five: an adapter is first trained alone on the same examples, as "pfeiffer" in compare_placements.py of
            lesson 05 and at the rate which that table found; its head is thrown away
softened    the four; K starts √d times smaller, so that at the start all scores are those of equation 6.1 over √d
shuffled    the four, with the numbers within each of their tensors in another order: as large, and they know nothing

A seed draws the examples, their order, Q, K, the target's own adapter, and the other order. Learning rates lie on 1, 2,
5, 10, …: five other seeds try a first window, which is widened as long as the best mean accuracy on the validation
split lies at its edge.

Lesson 06 reads the table, compare_fusions.jsonl. A new adapter on the same examples is "pfeiffer" in
compare_placements.jsonl of lesson 05; full fine-tuning and the frozen model with a converged head stand in
compare_masks.jsonl of lesson 09.
"""

import copy
import hashlib
import runpy
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

SOURCE = runpy.run_path(str(Path(__file__).with_name("adapt_sources.py")))
MODEL, SOURCES, FOLDER = SOURCE["MODEL"], SOURCE["SOURCES"], SOURCE["FOLDER"]
CASES, STEPS, BATCH, SEARCH = [("verdicts", 64), ("animals", 256)], 120, 16, range(100, 105)
RATES = [1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2]
WAYS, WINDOW, OWN_RATE = ("fusion", "own too", "softened", "shuffled"), (1e-3, 5e-3), 1e-2


@cache
def own(task, n, seed):
    """Train the target's own adapter on a seed's examples; the folder that holds it."""
    model, folder = copy.deepcopy(prepared(MODEL, task)[0]), Path(mkdtemp()) / "own"
    pefttutor.Adapter(**SOURCE["ADAPTER"], init_seed=seed).attach(model.model, name="own")
    examples = drawn(MODEL, task, n, seed)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=OWN_RATE, seed=seed)
    pefttutor.save(model.model, folder)
    return folder


def train(task, n, way, lr, seed):
    """Fuse adapters for the n examples of a seed in one way; what `scores` says of it."""
    model, files = copy.deepcopy(prepared(MODEL, task)[0]), {name: FOLDER / name for name in SOURCES}
    if way == "own too":
        files["own"] = own(task, n, seed)
    for name, folder in files.items():
        pefttutor.load(model.model, folder, name=name)
    pefttutor.AdapterFusion(adapters=tuple(files), init_seed=seed).attach(model.model, name="fusion")
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if way == "shuffled" and "adapter_" in name:
            p.data = p.data.flatten()[torch.randperm(p.numel(), generator=generator)].view_as(p)
        if way == "softened" and "fusion_key" in name:
            p.data /= len(p) ** 0.5
    pefttutor.fit(model, drawn(MODEL, task, n, seed), steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return scores(model, MODEL, task, searching=seed in SEARCH)


def digest():
    """sha256 of the four adapters' files."""
    files = [(FOLDER / source / "adapter.safetensors").read_bytes() for source in SOURCES]
    return hashlib.sha256(b"".join(files)).hexdigest()


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*case, way): WINDOW for case in CASES for way in WAYS},
        columns=("task", "n", "way"),
        rates=RATES,
        seeds=range(10),
        search_seeds=SEARCH,
        model=MODEL,
        tasks=[*SOURCES, *(task for task, _ in CASES)],
        steps=STEPS,
        batch_size=BATCH,
        adapters_sha256=digest(),
    )
