"""Which learning rate and which examples a step takes: functions of the step's number alone."""

import math
from functools import lru_cache

import torch


def lr_factor(step: int, steps: int, *, warmup: float, schedule: str) -> float:
    """The learning rate of step 0, 1, … as a fraction of its peak.

    With w = ⌊warmup · steps⌋: (step + 1) / (w + 1) while step < w. Then p = (step − w) / (steps − w) grows
    from 0, and the fraction is 1 (constant), 1 − p (linear) or (1 + cos πp) / 2 (cosine). It is never 0, so that
    each step counts.

    >>> [lr_factor(step, 5, warmup=0.2, schedule="linear") for step in range(5)]
    [0.5, 1.0, 0.75, 0.5, 0.25]
    """
    rising = int(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    passed = (step - rising) / (steps - rising)
    return {"constant": 1.0, "linear": 1 - passed, "cosine": (1 + math.cos(math.pi * passed)) / 2}[schedule]


def step_indices(step: int, examples: int, per_step: int, seed: int) -> list[int]:
    """Which examples step 0, 1, … takes: each epoch a new order, a function of seed and epoch alone.

    So the position in the data is the number of the step, and nothing else has to be kept for resuming.

    >>> sorted(step_indices(0, examples=3, per_step=2, seed=0) + step_indices(1, examples=3, per_step=2, seed=0))
    [0, 1, 2]
    """
    epoch, position = divmod(step, math.ceil(examples / per_step))
    return _order(examples, seed, epoch)[position * per_step : (position + 1) * per_step]


@lru_cache(maxsize=2)
def _order(examples: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
    return torch.randperm(examples, generator=generator).tolist()
