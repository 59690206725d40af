"""Lesson 06: the control of compare_animals.py, the same fusion of adapters that know nothing.

    python data/lessons/06/compare_shuffled.py        after adapt_sources.py; goes on where it was stopped

The numbers within each of the four adapters' tensors stand in another order, which a seed draws: networks as large as
the trained ones, without what these have learned. All else is that of compare_animals.py. Lesson 06 reads the table,
compare_shuffled.jsonl.
"""

import runpy
from pathlib import Path

import torch

from pefttutor.authoring.tables import compare

FIRST = runpy.run_path(str(Path(__file__).with_name("compare_animals.py")))


def shuffle(model, seed):
    """Put the numbers of each adapter's tensors into another order."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "adapter_" in name:
            p.data = p.data.flatten()[torch.randperm(p.numel(), generator=generator)].view_as(p)


def train(task, n, way, lr, seed):
    """Fuse the shuffled adapters."""
    return FIRST["trained"](task, n, lr, seed, shuffle)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*FIRST["CASE"], "shuffled"): FIRST["WINDOW"]},
        columns=("task", "n", "way"),
        rates=FIRST["RATES"],
        seeds=range(10),
        search_seeds=FIRST["SEARCH"],
        model=FIRST["MODEL"],
        tasks=[*FIRST["SOURCES"], FIRST["CASE"][0]],
        steps=FIRST["STEPS"],
        batch_size=FIRST["BATCH"],
        adapters_sha256=FIRST["digest"](),
    )
