"""What no low-rank method may take in silence: a rank above the matrix, and a training that never asks it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pefttutor as pt
from pefttutor import lowrank
from pefttutor.train.hooks import Hooks
from tests.pictures import differences, picture

FIELDS = {
    "AdaLoRA": ("init_r",),
    "DynamicDoRA": ("init_r",),
    "IncreLoRA": ("init_r", "target_r", "max_r"),
    "MPO": ("bond_dim",),
}
# What a method needs beside a rank.
PRUNED = {"total_step": 5, "target_r": 1}
OWN = {"AdaLoRA": PRUNED, "DynamicDoRA": PRUNED, "MELoRA": {"n": 1}}
# Of these a larger one makes sense, and is described there.
ANY_RANK = {
    "LoKr": "its factors are whole then, which is KronA",
    "LoRAHub": "its plug-ins have theirs",
    "MoRA": "r says how many values train, and not a rank",
    "VeRA": "its directions are random and cost a value each",
}


@pytest.mark.parametrize("name", [name for name in lowrank.__all__ if name not in ANY_RANK])
def test_a_rank_above_the_matrix_is_refused_with_the_largest_that_fits(name):
    model = nn.Sequential(nn.Linear(12, 9))
    before, rank = picture(model), 99 if name == "MPO" else 10
    method = getattr(pt, name)(
        **OWN.get(name, {}) | dict.fromkeys(FIELDS.get(name, ("r",)), rank), target_modules=("0",)
    )
    with pytest.raises(ValueError, match=r"but .*(must be at most 9|with bonds of at most \d+)"):
        method.attach(model)
    with pytest.raises(ValueError, match="at most"):
        method.count(model)
    assert differences(before, picture(model)) == []


def test_mora_refuses_a_square_that_is_larger_than_the_layer():
    model = nn.Sequential(nn.Linear(12, 9))
    with pytest.raises(ValueError, match="r is 10"):
        pt.MoRA(r=10, target_modules=("0",)).attach(model)


SCHEDULED = [name for name in lowrank.__all__ if hasattr(getattr(pt, name), "after_step")]


def scheduled(name: str):
    pruned = {"init_r": 2, "target_r": 1, "total_step": 5}
    own = {"AdaLoRA": pruned, "DynamicDoRA": pruned, "IncreLoRA": {"target_r": 2, "max_r": 3}}
    return getattr(pt, name)(**own.get(name, {"r": 2}), target_modules=("0",))


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_step_that_is_never_called_is_told(name):
    """As a loop of one's own, or a Trainer without the callback, ends."""
    model = scheduled(name).attach(nn.Sequential(nn.Linear(12, 9)))
    model(torch.ones(1, 12)).sum().backward()
    with pytest.warns(UserWarning, match=f"{name}: .*after_step was never called.* in a Trainer"):
        Hooks(model).warn_of_unfinished()
    assert "SoRA" in SCHEDULED
    assert len(SCHEDULED) >= 7


@pytest.mark.parametrize("name", SCHEDULED)
def test_one_that_is_switched_off_has_no_steps_to_miss(name):
    """Its twin, of equal settings under another name, takes all."""
    model = scheduled(name).attach(nn.Sequential(nn.Linear(12, 9)), name="idle")
    scheduled(name).attach(pt.switch(model), name="it")
    model(torch.ones(1, 12)).sum().backward()
    Hooks(model).after_step(0)
    assert "never called" not in (scheduled(name).unfinished(model) or "")
