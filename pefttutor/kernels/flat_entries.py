"""The chosen entries of a tensor: read them, write them, and get their gradients alone.

An `index` holds the flat places of the chosen entries, each once, as int32 or int64: 4 or 8 bytes an entry.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["put", "read", "selected", "sorted_places", "write"]


@cache
def _scatters_by_int32(kind: str) -> bool:
    """Whether this torch scatters by int32 places on such a device (2.13 does); an older one needs them as int64."""
    value, place = torch.zeros(1, device=kind), torch.zeros(1, device=kind, dtype=torch.int32)
    try:
        value.clone().scatter_(0, place, value)
    except RuntimeError:
        return False
    return True


def sorted_places(index: Tensor, tensor: Tensor) -> Tensor:
    """The places in rising order, that of memory. Raises: ValueError unless they are the tensor's, each once.

    >>> sorted_places(torch.tensor([3, 0]), torch.zeros(2, 2))
    tensor([0, 3])
    """
    index = index.sort().values
    if len(index) and (index[0] < 0 or index[-1] >= tensor.numel() or (index[1:] == index[:-1]).any()):
        raise ValueError(
            f"an index reaches from {int(index[0])} to {int(index[-1])}, expected places 0 … {tensor.numel() - 1} "
            f"of a tensor {tuple(tensor.shape)}, each once"
        )
    return index


def read(tensor: Tensor, index: Tensor) -> Tensor:
    """The chosen entries of `tensor` as a vector. Shapes: tensor (…), index (k) → (k).

    >>> read(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 3]))
    tensor([1., 4.])
    """
    return tensor.detach().reshape(-1).index_select(0, index)


def write(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """Put `values` into their places in `tensor`; no other entry is touched. Shapes: (…), (k), (k).

    Autograd doesn't count it as a change: the same values may be written again between forward and backward.

    >>> weight = torch.zeros(2, 2)
    >>> write(weight, torch.tensor([0, 3]), torch.tensor([1.0, 4.0]))
    >>> weight.tolist()
    [[1.0, 0.0], [0.0, 4.0]]

    Raises: ValueError for a tensor that isn't contiguous.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"write: the tensor {tuple(tensor.shape)} isn't contiguous; call contiguous() first")
    put(tensor, index, values.detach().to(tensor.dtype))


def put(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """`write` without its checks and conversions."""
    places = index if _scatters_by_int32(tensor.device.type) else index.long()
    tensor.data.view(-1).scatter_(0, places, values)  # a third of index_copy_'s time


def selected(values: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """`weight`, whose gradient arrives in `values` for the chosen entries and nowhere for the others.

    `weight` must hold `values` at `index` already (see `write`). The result shares its memory: nothing is copied.

    >>> weight, values = torch.tensor([1.0, 2.0]), torch.tensor([2.0], requires_grad=True)
    >>> (selected(values, weight, torch.tensor([1])) * torch.tensor([5.0, 7.0])).sum().backward()
    >>> values.grad                                                     # of the second entry alone
    tensor([7.])

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
