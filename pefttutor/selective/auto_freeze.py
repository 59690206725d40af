"""AutoFreeze: freeze more and more of the first blocks, as soon as their gradients have settled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pefttutor import method as base
from pefttutor.selective.layers import below, blocks

__all__ = ["AutoFreeze", "settled"]


def settled(before: Tensor, now: Tensor, frozen: int, percentile: float = 50) -> int:
    """How many leading blocks are frozen next: all before the first whose gradient norm still changes much.

    η_l = |‖g_l‖ before − ‖g_l‖ now| / ‖g_l‖ before;  much: at or above the percentile of the blocks still training.

    Shapes: before, now (L), of which the first `frozen` aren't looked at. Returns a number in frozen … L − 1.
    """
    change = ((before - now).abs() / before.clamp(min=1e-12))[frozen:]
    limit = torch.quantile(change, percentile / 100)
    return frozen + int((change >= limit).float().argmax())


@dataclass(frozen=True, kw_only=True)
class AutoFreeze:
    """Full fine-tuning that stops training a growing prefix of blocks, and everything below them (`layers.below`).

    interval: steps between decisions. percentile: see `settled`.

    A head tied to the input embeddings is frozen with them. A frozen prefix needs no backward pass, and its output
    can be kept: see `CachedPrefix`. The gradient norms and the number of frozen blocks are buffers of the model, so
    an interrupted run goes on.

    Cost: at first that of full fine-tuning, then less; a norm a parameter in each step.
    Raises: ValueError for an interval < 1 or a percentile outside (0, 100].
    Source: Liu et al. 2021, arXiv:2102.01386, algorithm 1 (the gradient-norm test).
    """

    interval: int = 100
    percentile: float = 50

    def __post_init__(self) -> None:
        if self.interval < 1 or not 0 < self.percentile <= 100:
            raise ValueError(
                f"interval is {self.interval!r} and percentile {self.percentile!r}; expected ≥ 1 and in (0, 100]."
            )

    def attach(self, model: nn.Module) -> nn.Module:
        """Let everything train, and add the buffers that AutoFreeze decides by. Raises: RuntimeError if adapted."""
        base.refuse_adapted(model)
        depth = len(blocks(model)[1])
        base.freeze(model)
        for p in model.parameters():
            p.requires_grad_(p.is_floating_point())
        model.register_buffer("autofreeze_norms", torch.zeros(2, depth))  # last interval, this one
        model.register_buffer("autofreeze_frozen", torch.zeros((), dtype=torch.int64))
        return base.mark(model, self, buffers=["autofreeze_norms", "autofreeze_frozen"])

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Add up this step's gradient norms; after each interval, freeze what has settled."""
        name, stack = blocks(model)
        norms, frozen = model.get_buffer("autofreeze_norms"), model.get_buffer("autofreeze_frozen")
        grads = [[p.grad for p in block.parameters() if p.grad is not None] for block in stack]
        now = torch.stack([sum((g.abs().sum() for g in found), norms.new_zeros(())) for found in grads])
        if now.isfinite().all():  # a step that overflowed says nothing about what has settled
            norms[1] += now
        if (step + 1) % self.interval == 0:
            if norms[0].any():
                frozen.fill_(settled(norms[0], norms[1], int(frozen), self.percentile))
            norms[0], norms[1] = norms[1].clone(), 0
        _freeze_first(model, name, int(frozen))


def _freeze_first(model: nn.Module, name: str, frozen: int) -> None:
    """Freeze the first blocks, and what comes before them, if there are any such blocks."""
    if frozen == 0:
        return
    first = tuple(f"{name}.{i}." for i in range(frozen))
    before = below(model)
    for parameter_name, p in model.named_parameters():
        if parameter_name.startswith(first) or p in before:
            p.requires_grad_(False)
            p.grad = None
