"""AutoFreeze: freeze more and more of the first blocks, as soon as their gradients have settled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pefttutor.method import DEFAULT, attached, attaching
from pefttutor.parts.added import Added
from pefttutor.parts.attachment import added_key
from pefttutor.parts.blocks import below, blocks
from pefttutor.parts.freezing import train_everything
from pefttutor.parts.settings import check_number, check_whole

__all__ = ["AutoFreeze", "settled"]

NORMS, FROZEN = "autofreeze_norms", "autofreeze_frozen"


def settled(before: Tensor, now: Tensor, frozen: int, percentile: float = 50) -> int:
    """How many leading blocks are frozen next: all before the first whose gradient norm still changes much.

    η_l = |‖g_l‖ before − ‖g_l‖ now| / ‖g_l‖ before

    "Much" means at or above the percentile of the changes in the blocks that still train.

    >>> before, now = torch.ones(4), torch.tensor([1.0, 1.1, 2.0, 1.0])
    >>> settled(before, now, frozen=0)          # η is 0, 0.1, 1, 0, its median 0.05: only block 0 has settled
    1

    Shapes: before, now (L), of which the first `frozen` aren't looked at. Returns a number in frozen … L − 1.
    """
    change = ((before - now).abs() / before.clamp(min=1e-12))[frozen:]
    limit = torch.quantile(change, percentile / 100)
    return frozen + int((change >= limit).float().argmax())


@dataclass(frozen=True, kw_only=True)
class AutoFreeze:
    """Full fine-tuning that stops training a growing prefix of blocks, and everything below them (`layers.below`).

    >>> model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))})
    >>> AutoFreeze(interval=50).attach(model).autofreeze_norms      # of the last interval and of this one, by block
    tensor([[0., 0., 0.],
            [0., 0., 0.]])

    interval: how many steps lie between two decisions. percentile: see `settled`.

    A head tied to the input embeddings is frozen with them. A frozen prefix needs no backward pass, and its output
    can be kept: see `CachedPrefix`. The gradient norms and the number of frozen blocks are buffers of the model, so
    an interrupted run goes on.

    Cost: at first that of full fine-tuning, then less; in each step one norm for each parameter.
    Raises: ValueError for an interval < 1 or a percentile outside (0, 100].
    Source: Liu et al. 2021, arXiv:2102.01386, algorithm 1 (the gradient-norm test).
    """

    interval: int = 100
    percentile: float = 50

    def __post_init__(self) -> None:
        check_whole(self, "interval")
        check_number(self, "percentile", above=0, below=100 + 1e-9)

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Let everything train, and add the buffers to decide by. Raises: ValueError if the name is in use."""
        with attaching(model, self, name) as new:
            depth, device = len(blocks(model)[1]), next(model.parameters()).device
            new.add(train_everything(model))
            norms = torch.zeros(2, depth, device=device)  # (2, L): of the last interval, and of this one
            frozen = torch.zeros((), dtype=torch.int64, device=device)
            names = [added_key(key, name) for key in (NORMS, FROZEN)]
            new.add(Added((model, "", key, t) for key, t in zip(names, (norms, frozen), strict=True)))
        return model

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Add up this step's gradient norms; after each interval, freeze what has settled."""
        for attachment in attached(model).values():
            if attachment.method != self or not attachment.learns:
                continue
            norms, frozen = (model.get_buffer(added_key(key, attachment.name)) for key in (NORMS, FROZEN))
            others = [a for a in attached(model).values() if a is not attachment and a.learns]
            kept = {id(p) for other in others for p in other.trained()}
            self._decide(model, norms, frozen, step, kept)

    def _decide(self, model: nn.Module, norms: Tensor, frozen: Tensor, step: int, kept: set[int]) -> None:
        path, layers = blocks(model)
        grads = [[p.grad for p in block.parameters() if p.grad is not None] for block in layers]
        sums = [[g.abs().sum().to(norms) for g in of_block] for of_block in grads]
        now = torch.stack([torch.stack(terms).sum() if terms else norms.new_zeros(()) for terms in sums])
        if now.isfinite().all():  # a step that overflowed says nothing about what has settled
            norms[1] += now
        if (step + 1) % self.interval == 0:
            if norms[0].any():
                frozen.fill_(settled(norms[0], norms[1], int(frozen), self.percentile))
            norms[0], norms[1] = norms[1].clone(), 0
        _freeze_first(model, path, int(frozen), kept)


def _freeze_first(model: nn.Module, path: str, frozen: int, kept: set[int]) -> None:
    """Freeze the first blocks, and what comes before them, if there are any such blocks.

    kept: the ids of what other methods train, which is theirs to freeze.
    """
    if frozen == 0:
        return
    first = tuple(f"{path}.{i}." for i in range(frozen))
    before = below(model)
    for name, p in model.named_parameters():
        if id(p) not in kept and (name.startswith(first) or p in before):
            p.requires_grad_(False)
            p.grad = None
