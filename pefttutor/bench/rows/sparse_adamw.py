"""One optimizer step on chosen entries, against torch's fused AdamW with a mask on the gradient.

The bound gathers and scatters the chosen entries, on all threads, and computes nothing.

State is what the optimizer keeps of each entry. What says which entries train isn't counted: int32 places of ours,
4 bytes a chosen entry; the peer's mask, a byte an entry.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pefttutor.bench.row import Row, Side, Step
from pefttutor.kernels.flat_entries import read, write
from pefttutor.kernels.sparse_adamw import SparseAdamW
from pefttutor.kernels.threads import share

TENSORS, SHAPE = 8, (768, 768)


def build(side: Side, seed: int, *, p: float) -> Step:
    """The same weights, gradients and masks; no weight decay, because the peer would decay what is masked."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(SHAPE, generator=generator).requires_grad_() for _ in range(TENSORS)]
    grads = [torch.randn(SHAPE, generator=generator) for _ in range(TENSORS)]
    size = weights[0].numel()
    chosen = [torch.randperm(size, generator=generator)[: int(p * size)] for _ in range(TENSORS)]
    index = [places.to(torch.int32).sort().values for places in chosen]
    if side == "bound":
        items = list(zip(weights, grads, index, strict=True))
        return partial(_move, items)
    if side == "ours":
        ours = SparseAdamW(zip(weights, index, strict=True), lr=1e-3, weight_decay=0, fused=True)
        return _Update(ours, weights, grads, None)
    masks = [torch.zeros(size, dtype=torch.bool).index_fill_(0, places, True) for places in chosen]
    peer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0, fused=True)
    return _Update(peer, weights, grads, [mask.view(SHAPE) for mask in masks])


def _move(items: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    def one(item: tuple[Tensor, Tensor, Tensor]) -> None:
        weight, grad, index = item
        values = read(weight, index)
        read(grad, index)
        write(weight, index, values)

    share(one, items, items[0][0].device)
    return {}


class _Update:
    """A step with the same gradients every time."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        weights: list[Tensor],
        grads: list[Tensor],
        masks: list[Tensor] | None,
    ) -> None:
        self.optimizer, self.weights, self.grads, self.masks = optimizer, weights, grads, masks

    def __call__(self) -> dict[str, Tensor]:
        for i, (weight, grad) in enumerate(zip(self.weights, self.grads, strict=True)):
            weight.grad = grad if self.masks is None else grad.mul_(self.masks[i])
        self.optimizer.step()
        return {str(i): weight.detach() for i, weight in enumerate(self.weights)}


def _row(p: float, time: float) -> Row:
    return Row(
        name=f"sparse_adamw_{p:g}",
        work=f"AdamW step on p = {p:g} of {TENSORS} × {SHAPE[0]} × {SHAPE[1]} entries",
        peer="torch fused AdamW, gradient mask",
        build=partial(build, p=p),
        goals={"time": time, "state": p},
        bound="the chosen entries gathered and scattered",
        rounds=31,
    )


ROWS = [_row(0.3, 0.85), _row(0.1, 0.45), _row(0.005, 0.09)]
