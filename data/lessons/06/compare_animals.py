"""Lesson 06: four adapters of other tasks fused for a small target task, over ten seeds: animals, 256 examples.

    python data/lessons/06/compare_animals.py        after adapt_sources.py; goes on where it was stopped

The adapters of sentiment, guests, most and topic are frozen; Q, K, V and a new head train, for 120 steps of 16. A seed
draws the examples, their order, Q and K. Learning rates lie on 1, 2, 5, 10, …: five other seeds try a first window,
which is widened as long as the best mean accuracy on the validation split lies at its edge.

Lesson 06 reads the table, compare_animals.jsonl. compare_verdicts.py does the same for another target. A new adapter on
the same examples is "pfeiffer" in compare_placements.jsonl of lesson 05; full fine-tuning and the frozen model with a
converged head stand in compare_masks.jsonl of lesson 09.
"""

import copy
import hashlib
import runpy
from pathlib import Path

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

SOURCE = runpy.run_path(str(Path(__file__).with_name("adapt_sources.py")))
MODEL, SOURCES, FOLDER = SOURCE["MODEL"], SOURCE["SOURCES"], SOURCE["FOLDER"]
CASE, STEPS, BATCH, SEARCH = ("animals", 256), 120, 16, range(100, 105)
RATES, WINDOW = [1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2], (5e-3, 2e-2)


def trained(task, n, lr, seed, prepare=lambda model, seed: None):
    """Adapt campus-nano to the n examples of a seed, with the adapters as `prepare` leaves them; its scores."""
    base, splits = prepared(MODEL, task)
    model, examples = copy.deepcopy(base), drawn(MODEL, task, n, seed)
    for source in SOURCES:
        pefttutor.load(model.model, FOLDER / source, name=source)
    prepare(model, seed)
    pefttutor.AdapterFusion(adapters=SOURCES, init_seed=seed).attach(model.model, name="fusion")
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    if seed in SEARCH:  # the search looks at nothing else
        return {"validation": pefttutor.evaluate(model, splits["validation"])["accuracy"]}
    return scores(model, MODEL, task)


def train(task, n, way, lr, seed):
    """Fuse the adapters as they are."""
    return trained(task, n, lr, seed)


def digest():
    """sha256 of the four adapters' files."""
    files = [(FOLDER / source / "adapter.safetensors").read_bytes() for source in SOURCES]
    return hashlib.sha256(b"".join(files)).hexdigest()


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*CASE, "fusion"): WINDOW},
        columns=("task", "n", "way"),
        rates=RATES,
        seeds=range(10),
        search_seeds=SEARCH,
        model=MODEL,
        tasks=[*SOURCES, CASE[0]],
        steps=STEPS,
        batch_size=BATCH,
        adapters_sha256=digest(),
    )
