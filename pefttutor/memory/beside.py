"""What a side network keeps: its own narrow blocks, and what they read of the model beside which it stands."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pefttutor.memory.families import FAMILIES
from pefttutor.memory.paper import Paper
from pefttutor.memory.step import Step
from pefttutor.memory.tape import Tape
from pefttutor.method import attached
from pefttutor.parts.blocks import blocks
from pefttutor.parts.ladder import Ladder, Reading
from pefttutor.parts.norms import is_norm

__all__ = ["ladders", "spoken"]


def ladders(model: nn.Module) -> list[Ladder]:
    """The side networks that take effect; what they train is met by them alone."""
    active = [a for a in attached(model).values() if a.active]
    return [part.ladder for a in active for part in a.parts if isinstance(part, Reading)]


def spoken(tape: Tape, model: Any, ladder: Ladder, step: Step, hidden: Paper) -> Paper:
    """What the side network says in the place of `hidden`, after its own pass on the tape.

    It keeps h, for D, and of each gate's sum both summands; then what the narrow blocks keep, and what U reads.

    Shapes: (batch · sequence, d) → the same.
    """
    around = model.get_submodule(blocks(model)[0].rpartition(".")[0])
    own = list(ladder.held_in(around).values())
    tape.met.update(own)
    narrow, dtype = _narrow(model, ladder, own[0].dtype), own[0].dtype
    climbing = _Climbing(device=tape.device, kept=tape.kept, peaks=tape.peaks, met=tape.met)
    climbing.read = hidden.like(itemsize=dtype.itemsize, grad=False)
    tape.save(climbing.read.like(), "layer inputs")  # what goes into the first block
    x = climbing.read.like(width=hidden.width // ladder.reduction, grad=True)
    x = FAMILIES[model.config.model_type](climbing, narrow, step, x)
    return tape.cast(tape.linear(x, hidden.width, "layer inputs", weight=True), hidden.itemsize).like(
        grad=True
    )


def _narrow(model: Any, ladder: Ladder, dtype: torch.dtype) -> Any:
    """A model of this class without values whose blocks, and the norms after them, are the side network's."""
    with torch.device("meta"):
        narrow = type(model)._from_config(copy.deepcopy(ladder.config), dtype=dtype).requires_grad_(False)
    path, stack = blocks(narrow)
    stack.requires_grad_(True)
    for module in narrow.get_submodule(path.rpartition(".")[0]).children():
        if is_norm(module):
            module.requires_grad_(True)
    return narrow


@dataclass
class _Climbing(Tape):
    """A tape of narrow blocks, each of which gets μ s + (1 − μ) D h."""

    read: Any = None

    def block(self, forward: Callable[..., Paper], layer: nn.Module, x: Paper, **more: Any) -> Paper:
        self.save(self.read.like(), "layer inputs")
        for summand in (x, x.like()):
            self.save(summand, "layer inputs")
        return super().block(forward, layer, x.like(grad=True), **more)
