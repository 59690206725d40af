"""Lesson 15: a start as large as PiSSA's at random directions, on 64 examples of verdicts, over ten seeds.

    python data/lessons/15/random_verdicts.py        goes on where it was stopped

The control for PiSSA starts at eight orthonormal directions drawn by the seed, with PiSSA's singular values: it is as
large and knows nothing of the weight. It adapts q_proj and v_proj of campus-nano with the factor α/r = 2, and trains
the new head, for 120 steps of 16, as PiSSA does in pissa_verdicts.py. A seed draws the examples, their order and the
directions. Five other seeds try the learning rates 0.01 and 0.02, no others.

Lesson 15 reads the table, random_verdicts.jsonl.
"""

import copy
from dataclasses import dataclass

import torch

import pefttutor
from pefttutor.authoring.tables import compare, drawn, prepared, scores
from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.from_start import FromStart
from pefttutor.parts.linear import dense_weight
from pefttutor.parts.lowrank_targets import add_lowrank

MODEL, HEAD, STEPS, BATCH = "campus-nano", ("score",), 120, 16
TASK, N, WINDOW = "verdicts", 64, (1e-2, 2e-2)


@dataclass(frozen=True, kw_only=True)
class RandomStart:
    """PiSSA's singular values, and directions that are drawn: s · B₀ A₀ = U' S_r V'ᵀ."""

    r: int
    lora_alpha: float
    init_seed: int
    target_modules: tuple = ("q_proj", "v_proj")
    modules_to_save: tuple = ()

    @property
    def scaling(self):
        return self.lora_alpha / self.r

    def attach(self, model, *, name=DEFAULT):
        generator = torch.Generator().manual_seed(self.init_seed)

        def factors(layer):
            weight = dense_weight(layer).detach()
            root = (torch.linalg.svdvals(weight)[: self.r] / self.scaling).sqrt()
            U, V = (torch.linalg.qr(torch.randn(n, self.r, generator=generator)).Q for n in weight.shape)
            return (V * root).t().contiguous(), U * root

        with attaching(model, self, name) as new:
            add_lowrank(new, model, factors, FromStart)
        return model


def train(task, n, way, lr, seed):
    """Adapt campus-nano to the n examples of a seed; what `scores` says of it."""
    model = copy.deepcopy(prepared(MODEL, task)[0])
    RandomStart(r=8, lora_alpha=16, init_seed=seed, modules_to_save=HEAD).attach(model)
    examples = drawn(MODEL, task, n, seed)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return scores(model, MODEL, task)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(TASK, N, "random start"): WINDOW},
        columns=("task", "n", "way"),
        rates=[1e-2, 2e-2],
        seeds=range(10),
        search_seeds=range(100, 105),
        model=MODEL,
        tasks=[TASK],
        steps=STEPS,
        batch_size=BATCH,
    )
