"""One optimizer step on chosen entries, against torch's fused AdamW with a mask on the gradient, and against six
lines of stock torch: for each tensor a vector of its chosen entries, which torch's fused AdamW trains.

The second peer doesn't look at the tensor before its step: what others change there is lost, where ours follows
what autograd has seen.
The bound gathers and scatters the chosen entries, on all threads, and computes nothing.

State is what the optimizer keeps of each entry. What says which entries train isn't counted: int32 places of ours,
4 bytes a chosen entry; the first peer's mask, a byte an entry.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.bench.row import Row, Side, Step
from pefttutor.kernels.flat_entries import read, write
from pefttutor.kernels.sparse_adamw import SparseAdamW
from pefttutor.kernels.threads import share

TENSORS, SHAPE = 8, (768, 768)
# No decay, because the mask's peer would decay the entries that aren't chosen.
SETTINGS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0, "fused": True}


def build(side: Side, seed: int, device: str, *, p: float, stock: bool) -> Step:
    """The same weights, gradients and chosen entries. stock: the peer is the second one."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> list[Tensor]:
        return [torch.randn(SHAPE, generator=generator).to(device) for _ in range(TENSORS)]

    weights, grads = [weight.requires_grad_() for weight in draw()], draw()
    size = weights[0].numel()
    chosen = [torch.randperm(size, generator=generator)[: int(p * size)].to(device) for _ in range(TENSORS)]
    index = [places.to(torch.int32).sort().values for places in chosen]
    if side == "bound":
        return partial(_move, list(zip(weights, grads, index, strict=True)))
    if side == "ours":
        ours = SparseAdamW(zip(weights, index, strict=True), **SETTINGS)
        return _Update(ours, weights, grads, None)
    if stock:
        return _Stock(weights, grads, [places.long() for places in index])
    masks = [torch.zeros(size, dtype=torch.bool, device=device).index_fill_(0, c, True) for c in chosen]
    peer = torch.optim.AdamW(weights, **SETTINGS)
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


class _Stock:
    """Such a step in stock torch: gather the gradients, step on the vectors, scatter them."""

    def __init__(self, weights: list[Tensor], grads: list[Tensor], index: list[Tensor]) -> None:
        self.weights, self.grads, self.index = weights, grads, index
        pairs = zip(weights, index, strict=True)
        self.values = [nn.Parameter(weight.detach().view(-1)[places]) for weight, places in pairs]
        self.optimizer = torch.optim.AdamW(self.values, **SETTINGS)

    def __call__(self) -> dict[str, Tensor]:
        for values, grad, places in zip(self.values, self.grads, self.index, strict=True):
            values.grad = grad.view(-1).index_select(0, places)
        self.optimizer.step()
        for weight, values, places in zip(self.weights, self.values, self.index, strict=True):
            weight.detach().view(-1).index_copy_(0, places, values.detach())
        return {str(i): weight.detach() for i, weight in enumerate(self.weights)}


def _row(p: float, *, stock: bool, **goals: float) -> Row:
    return Row(
        name=f"sparse_adamw_{p:g}" + ("_stock" if stock else ""),
        work=f"AdamW step on p = {p:g} of {TENSORS} × {SHAPE[0]} × {SHAPE[1]} entries",
        peer="torch fused AdamW on vectors of the entries" if stock else "torch fused AdamW, gradient mask",
        build=partial(build, p=p, stock=stock),
        goals=goals | ({} if stock else {"state": p}),
        cuda_goals={"time": 1.0} if stock else {"time": CUDA[p], "state": p},
        bound="the chosen entries gathered and scattered",
        rounds=31,
    )


CUDA = {0.3: 1.0, 0.1: 0.6, 0.005: 0.3}
ROWS = [
    *(_row(p, stock=False, time=time) for p, time in ((0.3, 0.80), (0.1, 0.50), (0.005, 0.15))),
    *(_row(p, stock=True, time=0.95) for p in CUDA),
]
