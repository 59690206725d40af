"""Lesson 06: the fusion of compare_animals.py and compare_verdicts.py, with the target's own adapter among the files.

    python data/lessons/06/compare_own.py        after adapt_sources.py; goes on where it was stopped

On a seed's examples an adapter is first trained alone, as "pfeiffer" in compare_placements.py of lesson 05, at the
rate which that table found; its head is thrown away. Then it and the four of adapt_sources.py are fused on the same
examples, as in the paper, with a new head. All else is that of compare_animals.py. Lesson 06 reads the table,
compare_own.jsonl.
"""

import copy
import runpy
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

FIRST = runpy.run_path(str(Path(__file__).with_name("compare_animals.py")))
MODEL, SOURCES, FOLDER, STEPS, BATCH, SEARCH, RATES = (
    FIRST[name] for name in ("MODEL", "SOURCES", "FOLDER", "STEPS", "BATCH", "SEARCH", "RATES")
)
CASES, WINDOW, OWN_RATE = [("verdicts", 64), ("animals", 256)], (1e-3, 5e-3), 1e-2


@cache
def own(task, n, seed):
    """Train the target's own adapter on a seed's examples; the folder that holds it."""
    model, folder = copy.deepcopy(prepared(MODEL, task)[0]), Path(mkdtemp())
    pefttutor.Adapter(**FIRST["SOURCE"]["ADAPTER"], init_seed=seed).attach(model.model, name="own")
    examples = drawn(MODEL, task, n, seed)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=OWN_RATE, seed=seed)
    pefttutor.save(model.model, folder / "own")
    return folder / "own"


def train(task, n, way, lr, seed):
    """Adapt campus-nano to the n examples of a seed; what `scores` says of it."""
    base, splits = prepared(MODEL, task)
    model, files = copy.deepcopy(base), {source: FOLDER / source for source in SOURCES}
    files["own"] = own(task, n, seed)
    for name, folder in files.items():
        pefttutor.load(model.model, folder, name=name)
    pefttutor.AdapterFusion(adapters=tuple(files), init_seed=seed).attach(model.model, name="fusion")
    pefttutor.fit(model, drawn(MODEL, task, n, seed), steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    if seed in SEARCH:  # the search looks at nothing else
        return {"validation": pefttutor.evaluate(model, splits["validation"])["accuracy"]}
    return scores(model, MODEL, task)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*case, "own too"): WINDOW for case in CASES},
        columns=("task", "n", "way"),
        rates=RATES,
        seeds=range(10),
        search_seeds=SEARCH,
        model=MODEL,
        tasks=[*SOURCES, *(task for task, _ in CASES)],
        steps=STEPS,
        batch_size=BATCH,
        adapters_sha256=FIRST["digest"](),
    )
