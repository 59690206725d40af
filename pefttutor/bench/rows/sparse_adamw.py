"""One optimizer step on chosen entries, against torch's fused AdamW with a mask on the gradient."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pefttutor.bench.row import Row, Side, Step
from pefttutor.kernels.sparse_adamw import SparseAdamW

TENSORS, SHAPE = 8, (768, 768)


def build(side: Side, seed: int, *, p: float) -> Step:
    """The same weights, gradients and masks; no weight decay, because the peer would decay what is masked."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(SHAPE, generator=generator).requires_grad_() for _ in range(TENSORS)]
    grads = [torch.randn(SHAPE, generator=generator) for _ in range(TENSORS)]
    masks = [torch.rand(SHAPE, generator=generator) < p for _ in range(TENSORS)]
    if side == "ours":
        index = [mask.flatten().nonzero().squeeze(1).to(torch.int32) for mask in masks]
        chosen = zip(weights, index, strict=True)
        ours = SparseAdamW(chosen, lr=1e-3, weight_decay=0, fused=True)
        return partial(_step, ours, weights, grads, None)
    peer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0, fused=True)
    return partial(_step, peer, weights, grads, masks)


def _step(
    optimizer: torch.optim.Optimizer, weights: list[Tensor], grads: list[Tensor], masks: list[Tensor] | None
) -> dict[str, Tensor]:
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        weight.grad = grad if masks is None else grad.mul_(masks[i])
    optimizer.step()
    return {str(i): weight.detach() for i, weight in enumerate(weights)}


def _row(p: float, time: float) -> Row:
    return Row(
        name=f"sparse_adamw_{p:g}",
        work=f"AdamW step on p = {p:g} of {TENSORS} × {SHAPE[0]} × {SHAPE[1]} entries",
        peer="torch fused AdamW, gradient mask",
        build=partial(build, p=p),
        goals={"time": time},
        rounds=31,
    )


ROWS = [_row(0.3, 0.85), _row(0.1, 0.45), _row(0.005, 0.09)]
