"""Train chosen entries of a tensor: their gradients, their optimizer state, and nothing of the others.

    w_i ← AdamW(w_i, g_i)   for the chosen i;        w_j is never written   for the others

A mask multiplied onto a dense gradient doesn't do this. Momentum moves entries that were chosen once, weight decay
moves all of them, and gradient and state stay as large as the model. Here the k chosen entries of a tensor are a
vector of their own, and torch's optimizer sees only that vector. Why it is fast and lean:

- gradient, both moments and the update have k entries, whatever the size of the tensor;
- gathering and scattering read and write k places; an entry that isn't chosen is not even read;
- `selected` lets autograd deliver the k gradients; a dense one exists for one tensor at a time, in its backward.

An `index` holds the flat places of the chosen entries, each once, as int32 or int64: 4 or 8 bytes an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["SparseAdamW", "SparseSGD", "read", "selected", "sparse_adamw_reference", "write"]

CHUNK = 1 << 20  # entries whose places are widened to int64 at once, where that is needed


def _scatters_by_int32() -> bool:
    """Whether this torch scatters by int32 places (2.13 does); an older one needs them as int64."""
    try:
        torch.zeros(1).scatter_(0, torch.zeros(1, dtype=torch.int32), torch.zeros(1))
    except RuntimeError:
        return False
    return True


_SHORT = _scatters_by_int32()


def sparse_adamw_reference(
    weight: Tensor,
    grad: Tensor,
    mask: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Tensor:
    """One step of AdamW on the entries where `mask` is true, as the formula says; returns the new weight.

    m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²,  w ← (1 − lr·λ)w − lr · (m / (1−β₁ᵗ)) / (√(v / (1−β₂ᵗ)) + ε)

    Shapes: all of the weight's; exp_avg and exp_avg_sq are updated in place, dense. step: t = 1, 2, …
    Source: Loshchilov & Hutter 2019, algorithm 2, restricted to a subset as in chapter eq. 4.6.
    """
    exp_avg.mul_(betas[0]).add_(grad * mask, alpha=1 - betas[0])
    exp_avg_sq.mul_(betas[1]).add_((grad * mask).square(), alpha=1 - betas[1])
    denominator = (exp_avg_sq / (1 - betas[1] ** step)).sqrt() + eps
    moved = weight * (1 - lr * weight_decay) - lr * (exp_avg / (1 - betas[0] ** step)) / denominator
    return torch.where(mask, moved, weight)


def read(tensor: Tensor, index: Tensor) -> Tensor:
    """The chosen entries of `tensor` as a vector. Shapes: tensor (…), index (k) → (k)."""
    return tensor.detach().reshape(-1).index_select(0, index)


def write(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """Put `values` into their places in `tensor`; no other entry is touched. Shapes: (…), (k), (k).

    Autograd doesn't count it as a change: the same values may be written again between forward and backward.

    Raises: ValueError for a tensor that isn't contiguous.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"write: the tensor {tuple(tensor.shape)} isn't contiguous; call contiguous() first")
    flat, values = tensor.data.view(-1), values.detach().to(tensor.dtype)
    for places, chunk in zip(index.split(CHUNK), values.split(CHUNK), strict=True):
        flat.scatter_(0, places if _SHORT else places.long(), chunk)  # a third of index_copy_'s time


def selected(values: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """`weight`, whose gradient arrives in `values` for the chosen entries and nowhere for the others.

    `weight` must hold `values` at `index` already (see `write`). The result shares its memory: nothing is copied.

    Shapes: values (k), weight (…), index (k) → (…).
    Cost: forward none; backward the layer's own dense weight gradient, gathered and freed at once.
    """
    return _Selected.apply(values, weight, index)


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.dtype = values.dtype
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return grad.reshape(-1).index_select(0, index).to(ctx.dtype), None, None


class _Chosen:
    """The chosen entries of some tensors, and the vectors that an optimizer trains in their place."""

    def __init__(self, chosen: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.pairs = [(weight, _checked(weight, index)) for weight, index in chosen]
        if len({id(weight) for weight, _ in self.pairs}) < len(self.pairs):
            raise ValueError("a tensor is given twice; give it once, with all of its chosen entries")
        self.values = [nn.Parameter(read(weight, index)) for weight, index in self.pairs]

    def gather(self) -> None:
        for (weight, index), values in zip(self.pairs, self.values, strict=True):
            torch.index_select(weight.detach().view(-1), 0, index, out=values.data)
            values.grad = None if weight.grad is None else read(weight.grad, index)

    def scatter(self) -> None:
        for (weight, index), values in zip(self.pairs, self.values, strict=True):
            if values.grad is not None:
                write(weight, index, values)
                values.grad = None

    def zero_grad(self) -> None:
        for weight, _ in self.pairs:
            weight.grad = None


def _checked(weight: Tensor, index: Tensor) -> Tensor:
    """Raise unless `index` names places of `weight`, each once; sorted, because that reads memory in order."""
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"an index is {tuple(index.shape)} of {index.dtype}, expected the flat places (k) as int32 or int64; "
            "of a boolean mask that is mask.flatten().nonzero().squeeze(1)"
        )
    if not weight.is_contiguous():
        raise ValueError(f"a tensor {tuple(weight.shape)} isn't contiguous; call contiguous() first")
    index = index.sort().values
    if len(index) and (index[0] < 0 or index[-1] >= weight.numel() or (index[1:] == index[:-1]).any()):
        raise ValueError(
            f"an index reaches from {int(index[0])} to {int(index[-1])}, expected places 0 … {weight.numel() - 1} "
            f"of a tensor {tuple(weight.shape)}, each once"
        )
    return index


class _OnChosen(torch.optim.Optimizer):
    """What makes an optimizer of torch, the next class in line, train the chosen entries alone."""

    def __init__(self, chosen: Iterable[tuple[Tensor, Tensor]], lr: float = 1e-3, **settings: Any) -> None:
        self._chosen = _Chosen(chosen)
        super().__init__(self._chosen.values, lr=lr, **settings)  # type: ignore[call-arg]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._chosen.gather()
        super().step()  # type: ignore[call-arg]
        self._chosen.scatter()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the tensors whose entries are trained."""
        self._chosen.zero_grad()


class SparseAdamW(_OnChosen, torch.optim.AdamW):
    """torch's AdamW on chosen entries: k values of each moment, and the other entries are never written.

        optimizer = SparseAdamW([(layer.weight, index)], lr=1e-3)     # layer.weight.grad is read, dense or not

    chosen: pairs of a tensor and the flat places of its chosen entries; the rest as in `torch.optim.AdamW`. With
    everything chosen the result is that of `torch.optim.AdamW`, bit for bit. A tensor without a gradient isn't moved.

    Cost: state 8 bytes a chosen float32 entry (its two moments); dense AdamW has 8 an entry.
    Raises: ValueError for an index that isn't one of its tensor.
    Source: Loshchilov & Hutter 2019, algorithm 2; the subset is chapter eq. 4.6.
    """


class SparseSGD(_OnChosen, torch.optim.SGD):
    """torch's SGD, with momentum and weight decay if asked for, on chosen entries; otherwise as `SparseAdamW`."""
