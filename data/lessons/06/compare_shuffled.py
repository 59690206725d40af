"""Lesson 06: the control of compare_animals.py, the same fusion of adapters that know nothing.

    python data/lessons/06/compare_shuffled.py        after adapt_sources.py; goes on where it was stopped

The numbers within each of the four adapters' tensors stand in another order, which a seed draws: networks as large as
the trained ones, without what these have learned. All else is that of compare_animals.py. Lesson 06 reads the table,
compare_shuffled.jsonl.
"""

import copy
import runpy
from pathlib import Path

import torch

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

FIRST = runpy.run_path(str(Path(__file__).with_name("compare_animals.py")))
MODEL, SOURCES, FOLDER, CASE, STEPS, BATCH, SEARCH, RATES = (
    FIRST[name] for name in ("MODEL", "SOURCES", "FOLDER", "CASE", "STEPS", "BATCH", "SEARCH", "RATES")
)
WINDOW = (1e-3, 5e-3)


def train(task, n, way, lr, seed):
    """Adapt campus-nano in one way to the n examples of a seed; what `scores` says of it."""
    base, splits = prepared(MODEL, task)
    model, examples = copy.deepcopy(base), drawn(MODEL, task, n, seed)
    for source in SOURCES:
        pefttutor.load(model.model, FOLDER / source, name=source)
    pefttutor.AdapterFusion(adapters=SOURCES, init_seed=seed).attach(model.model, name="fusion")
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if way == "shuffled" and "adapter_" in name:
            p.data = p.data.flatten()[torch.randperm(p.numel(), generator=generator)].view_as(p)
        if way == "softened" and "fusion_key" in name:
            p.data /= len(p) ** 0.5
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    if seed in SEARCH:  # the search looks at nothing else
        return {"validation": pefttutor.evaluate(model, splits["validation"])["accuracy"]}
    return scores(model, MODEL, task)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*CASE, "shuffled"): WINDOW},
        columns=("task", "n", "way"),
        rates=RATES,
        seeds=range(10),
        search_seeds=SEARCH,
        model=MODEL,
        tasks=[*SOURCES, CASE[0]],
        steps=STEPS,
        batch_size=BATCH,
        adapters_sha256=FIRST["digest"](),
    )
