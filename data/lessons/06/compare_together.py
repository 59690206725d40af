"""Appendix 06c: fusing the four adapters that were trained together, on the model that they have trained (MT-A).

    python data/lessons/06/compare_together.py        goes on where it was stopped

The shared model and the adapters are those of adapt_together.py, trained once and then frozen; targets, steps,
seeds and rates are those of compare_fusions.py, where the four were trained each alone. Ways:

fusion            the four adapters fused, with a new head
new adapter       a new adapter and a new head on the shared model, without the four
frozen + head     a head on the shared model, without adapters, fitted to its end

Appendix 06c reads the table, compare_together.jsonl.
"""

import copy
import runpy
from pathlib import Path

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

FIRST = runpy.run_path(str(Path(__file__).with_name("compare_fusions.py")))
SHARED = runpy.run_path(str(Path(__file__).with_name("adapt_together.py")))
MODEL, SOURCES, CASES, STEPS, BATCH, SEARCH = (
    FIRST[name] for name in ("MODEL", "SOURCES", "CASES", "STEPS", "BATCH", "SEARCH")
)
WINDOWS = {"fusion": (1e-3, 5e-3), "new adapter": (5e-3, 2e-2), "frozen + head": None}


def train(task, n, way, lr, seed):
    """Adapt the shared model in one way to the n examples of a seed; what `scores` says of it."""
    examples = drawn(MODEL, task, n, seed)
    model = SHARED["with_body"](copy.deepcopy(SHARED["together"]()[0]), task)
    if way != "fusion":
        pefttutor.detach(model.model)
    if way == "frozen + head":
        pefttutor.fit_head(model, examples, prepared(MODEL, task)[1]["validation"])
        return scores(model, MODEL, task)
    new = pefttutor.Adapter(**FIRST["SOURCE"]["ADAPTER"], init_seed=seed)
    method = pefttutor.AdapterFusion(adapters=SOURCES, init_seed=seed) if way == "fusion" else new
    method.attach(model.model, name="new")
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return scores(model, MODEL, task, searching=seed in SEARCH)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*case, way): window for case in CASES for way, window in WINDOWS.items()},
        columns=("task", "n", "way"),
        rates=FIRST["RATES"],
        seeds=range(10),
        search_seeds=SEARCH,
        model=MODEL,
        tasks=[*SOURCES, *(task for task, _ in CASES)],
        steps=STEPS,
        batch_size=BATCH,
        shared_steps=SHARED["STEPS"],
        shared_rates=[SHARED["MODEL_RATE"], SHARED["RATE"]],
    )
