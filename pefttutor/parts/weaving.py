"""Rows put among the rows of a batch, and taken out of it again: each text has its own places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["cut_to", "woven"]


def woven(own: Tensor, virtual: Tensor, after: Tensor) -> Tensor:
    """Each text's own rows, with the virtual ones after so many of them.

    >>> woven(torch.tensor([[0, 7, 8]]), torch.tensor([[5, 5]]), torch.tensor([1]))
    tensor([[0, 5, 5, 7, 8]])

    Shapes: (batch, n, …), (batch, P, …) and (batch) → (batch, P + n, …).
    """
    n, more, before = own.shape[1], virtual.shape[1], after[:, None]
    places = torch.arange(n + more, device=own.device).expand(len(own), -1)
    order = torch.where(places < before + more, n + places - before, places - more)
    return _taken(torch.cat([own, virtual.to(own.dtype)], 1), torch.where(places < before, places, order))


def _taken(rows: Tensor, order: Tensor) -> Tensor:
    """Shapes: (batch, m, …) and (batch, k) → (batch, k, …)."""
    batch, m = rows.shape[:2]
    flat = order + m * torch.arange(batch, device=order.device)[:, None]
    # Unlike gather, index_select keeps nothing of the rows for its backward pass.
    return rows.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, order.shape)


def cut_to(output: Any, places: Tensor, count: int) -> Any:
    """The output in which every tensor that has a row for each token has only those at `places`, `count` fewer.

    >>> cut_to((torch.arange(4.0).view(1, 4, 1),), torch.tensor([[0, 3]]), 2)[0].flatten()
    tensor([0., 3.])
    """
    batch, n = places.shape
    if isinstance(output, Tensor):
        if output.dim() == 3 and output.shape[:2] == (batch, n + count):
            return _taken(output, places)
        if output.dim() == 2 and len(output) == batch * (n + count):  # a router's
            return _taken(output.view(batch, n + count, -1), places).flatten(0, 1)
        return output
    if isinstance(output, dict):
        for key, value in list(output.items()):
            output[key] = cut_to(value, places, count)
        return output
    return tuple(cut_to(value, places, count) for value in output) if isinstance(output, tuple) else output
