"""Lesson 15: three starts at singular directions, or at directions that are drawn, over ten seeds of two tasks.

    python data/lessons/15/compare_starts.py        goes on where it was stopped

PiSSA starts at the eight strongest directions of q_proj and v_proj of campus-nano, MiLoRA at the eight weakest. The
control for PiSSA, "random start", has PiSSA's singular values at orthonormal directions drawn by the seed: it is as
large and knows nothing of the weight. Each has the factor α/r = 2 and trains its factors and the new head for 120 steps
of 16, as LoRA does in compare_ranks.py of lesson 12. A seed draws the examples, their order and such directions.
Learning rates lie on 1, 2, 5, 10, …: five other seeds try 0.005, 0.01 and 0.02, and more as long as the best mean
accuracy on the validation split lies at an edge.

Lesson 15 reads the table, compare_starts.jsonl.
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
CASES, WINDOW = [("verdicts", 64), ("animals", 256)], (5e-3, 2e-2)  # task, examples


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


METHODS = {
    "PiSSA": lambda seed, how: pefttutor.PiSSA(**how),
    "random start": lambda seed, how: RandomStart(init_seed=seed, **how),
    "MiLoRA": lambda seed, how: pefttutor.MiLoRA(**how),
}


def train(task, n, way, lr, seed):
    """Adapt campus-nano to the n examples of a seed; what `scores` says of it."""
    model = copy.deepcopy(prepared(MODEL, task)[0])
    METHODS[way](seed, {"r": 8, "lora_alpha": 16, "modules_to_save": HEAD}).attach(model)
    examples = drawn(MODEL, task, n, seed)
    pefttutor.fit(model, examples, steps=STEPS, batch_size=BATCH, lr=lr, seed=seed)
    return scores(model, MODEL, task)


if __name__ == "__main__":
    compare(
        __file__,
        train,
        {(*case, way): WINDOW for way in METHODS for case in CASES},
        columns=("task", "n", "way"),
        rates=[1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1],
        seeds=range(10),
        search_seeds=range(100, 105),
        model=MODEL,
        tasks=[task for task, _ in CASES],
        steps=STEPS,
        batch_size=BATCH,
    )
