"""Lesson 04: a prefix of 8 virtual tokens that trains itself or is made by an MLP, over ten seeds of two tasks.

    python data/lessons/04/compare_prefixes.py        goes on where it was stopped

"direct" is P-tuning v2: the prefix's own values train, from a standard normal draw. "MLP" is Li and Liang's: a table
and tanh layers of width d make it. A new head trains beside it. Tasks, examples, steps, batch and seeds are those of
compare_prompts.py in lesson 03, whose prompt has as many virtual tokens. Learning rates lie on 1, 3, 10, …: five other
seeds try a way's first window, which is widened as long as the best mean validation accuracy lies at its edge.

Lesson 04 reads the table, compare_prefixes.jsonl. Full fine-tuning and the frozen model with a converged head, on the
same examples, stand in compare_masks.jsonl of lesson 09.
"""

import copy
import runpy
from pathlib import Path

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared

PROMPTS = runpy.run_path(str(Path(__file__).parents[1] / "03/compare_prompts.py"))
MODEL, HEAD, STEPS, BATCH, TOKENS, CASES = (
    PROMPTS[name] for name in ("MODEL", "HEAD", "STEPS", "BATCH", "TOKENS", "CASES")
)
WAYS = {"direct": (3e-2, 3e-1), "MLP": (1e-3, 1e-2)}  # each with its first window of rates


def prefixed(way, task, n, lr, seed):
    """campus-nano with a prefix and a head that have learnt from the n examples of a seed."""
    model = copy.deepcopy(prepared(MODEL, task)[0])
    pefttutor.PrefixTuning(
        num_virtual_tokens=TOKENS, prefix_projection=way == "MLP", init_seed=seed, modules_to_save=HEAD
    ).attach(model)
    examples = drawn(MODEL, task, n, seed)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return model


def train(task, n, way, lr, seed):
    """Train a prefix in one way; what `judged` of compare_prompts.py says of it."""
    return PROMPTS["judged"](prefixed(way, task, n, lr, seed), MODEL, task, seed)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*case, way): window for case in CASES for way, window in WAYS.items()},
        columns=("task", "n", "way"),
        rates=PROMPTS["RATES"],
        seeds=range(10),
        search_seeds=PROMPTS["SEARCH"],
        model=MODEL,
        tasks=[task for task, _ in CASES],
        steps=STEPS,
        batch_size=BATCH,
        tokens=TOKENS,
    )
