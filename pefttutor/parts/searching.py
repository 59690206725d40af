"""Search a few numbers without gradients: somebody proposes them, and is told how good they were."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["search"]


@torch.no_grad()
def search(
    values: Tensor, cost: Callable[[], float], *, steps: int, optimizer: str, bound: float, seed: int
) -> list[float]:
    """Let `values` be what nevergrad's optimizer recommends after `steps` tries; return the cost of each.

    values: changed in place, within ±bound; the search begins at 0. cost: of the values as they are.

    Raises: ValueError for an optimizer that nevergrad doesn't have, and for a cost that isn't finite;
        ModuleNotFoundError without nevergrad. The values are then as they were.
    """
    before, costs = values.clone(), []
    found = _optimizer(optimizer, values.numel(), steps, bound, seed)
    try:
        for _ in range(steps):
            candidate = found.ask()
            values.copy_(torch.as_tensor(candidate.value))
            now = float(cost())
            if not math.isfinite(now):
                raise ValueError(f"the loss was {now} with the weights {values.tolist()}; it must be finite.")
            found.tell(candidate, now)
            costs.append(now)
        values.copy_(torch.as_tensor(found.provide_recommendation().value))
    except BaseException:
        values.copy_(before)
        raise
    return costs


def _optimizer(name: str, numbers: int, steps: int, bound: float, seed: int) -> Any:
    try:
        import nevergrad
    except ImportError as error:
        raise ModuleNotFoundError(
            'the search needs nevergrad, which isn\'t installed: pip install "pefttutor[search]"'
        ) from error
    known = nevergrad.optimizers.registry
    if name not in known:
        raise ValueError(f"optimizer is {name!r}, which nevergrad doesn't have; take 'NGOpt' or 'Shiwa'.")
    array = nevergrad.p.Array(init=[0.0] * numbers, lower=-bound, upper=bound)
    array.random_state.seed(seed)
    return known[name](parametrization=array, budget=steps)
