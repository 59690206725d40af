"""Lesson 15: do lengths and directions of a weight's rows change together? Three ways, over five seeds.

    python data/lessons/15/directions.py        goes on where it was stopped

Full fine-tuning, LoRA and DoRA (r = 8, α/r = 2, q_proj and v_proj) train campus-nano on 256 lists of animals for 120
steps of 16, full fine-tuning at its best rate in lesson 09, LoRA and DoRA at LoRA's best in lesson 12. After 30, 60, 90
and 120 steps every row w of a weight has changed by

    ΔM = | ‖w'‖ − ‖w‖ |          ΔD = 1 − cos(w', w)

and a weight by the means of these over its rows (Liu et al. 2024, arXiv:2402.09353, eq. 3 and 4). A line of the table
holds Pearson's correlation of the two: "query" and "value" over the 16 points of four layers at four times, as in the
paper's figure 2; "query_end" and "value_end" over the four layers at the end; "rows", over the 128 rows of a weight at
the end, as the mean over the eight weights.

Lesson 15 reads the table, directions.jsonl.
"""

import copy
from statistics import fmean

import torch

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores

MODEL, TASK, N, HEAD, STEPS, BATCH = "campus-nano", "animals", 256, ("score",), 120, 16
WAYS = {"full": 2e-3, "LoRA": 1e-2, "DoRA": 1e-2}
TARGETS = {"query": "q_proj", "value": "v_proj"}


def weights(model):
    """The adapted weights as they count: {(which, layer): (out, in)}."""
    plain = copy.deepcopy(model)
    if pefttutor.attached(plain):
        pefttutor.merge(plain)
    return {
        (which, i): getattr(block.self_attn, name).weight.detach().double()
        for which, name in TARGETS.items()
        for i, block in enumerate(plain.model.layers)
    }


def changes(now, before):
    """ΔM and ΔD of each row. Shapes: (out, in), (out, in) → (2, out)."""
    cosine = torch.nn.functional.cosine_similarity(now, before)
    return torch.stack([(now.norm(dim=1) - before.norm(dim=1)).abs(), 1 - cosine])


def correlation(points):
    """Pearson's, of points (2, n)."""
    return float(torch.corrcoef(points)[0, 1])


def train(way, _, seed):
    """Train in one way, at its rate in WAYS; what `scores` says, and how ΔM and ΔD are correlated."""
    base = prepared(MODEL, TASK)[0]
    model, start, seen = copy.deepcopy(base), weights(base), []
    if way != "full":
        method = {"LoRA": pefttutor.LoRA, "DoRA": pefttutor.DoRA}[way]
        method(r=8, lora_alpha=16, init_seed=seed, modules_to_save=HEAD).attach(model)

    def look(model):
        seen.append({key: changes(now, start[key]) for key, now in weights(model).items()})
        return len(seen)

    pefttutor.fit(
        model, drawn(MODEL, TASK, N, seed), steps=STEPS, batch_size=BATCH, lr=WAYS[way], seed=seed,
        metric=look, evaluate_every=30,
    )  # fmt: skip
    found = {}
    for which in TARGETS:
        points = [at[which, i].mean(1) for at in seen for i in range(4)]  # by time, then by layer
        found[which] = correlation(torch.stack(points, dim=1))
        found[f"{which}_end"] = correlation(torch.stack(points[-4:], dim=1))
    found["rows"] = fmean(correlation(rows) for rows in seen[-1].values())
    return scores(model, MODEL, TASK) | found


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(way,): None for way in WAYS},
        columns=("way",),
        rates=[],
        seeds=range(5),
        search_seeds=[],
        model=MODEL,
        tasks=[TASK],
        steps=STEPS,
        batch_size=BATCH,
    )
