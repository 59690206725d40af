"""Add up squared per-sample gradients while a backward pass goes on: no more of it is kept than it takes.

The backward pass comes to one layer after the other. As soon as the gradient at a layer's output is there it becomes
squares (see `per_sample`) and is dropped; only a weight with several uses waits for the gradients of all of them,
because their sum must come before the square.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pefttutor.kernels import per_sample, threads
from pefttutor.kernels.layer_calls import Call

__all__ = ["Squares"]

CACHED = 1 << 21  # bytes of a gradient that one thread of a CPU makes at a time: 1 to 4 MiB were fastest
AT_ONCE = 1 << 24  # bytes of gradients whose work a CPU's threads share in one go


class Squares:
    """Adds Σ_s G[s]² to `sums`, which has a tensor for each parameter; `calls` are all uses of their layers."""

    def __init__(self, calls: Sequence[Call], sums: Mapping[Tensor, Tensor], max_bytes: int) -> None:
        device = next(iter(sums.values())).device
        self._whole = threads.short_way(device)
        self._device, self._sums = device, sums
        self._max_bytes = max_bytes if self._whole else min(max_bytes // torch.get_num_threads(), CACHED)
        self._missing: Counter[Tensor] = Counter(p for call in calls for _, p in self._wanted(call))
        self._uses: dict[Tensor, list[per_sample.Use]] = {}
        self._pieces: list[Callable[[], None]] = []
        self._waiting = 0

    def add(self, call: Call, delta: Tensor) -> None:
        """The gradient at a call's output has come."""
        for name, p in self._wanted(call):
            self._uses.setdefault(p, []).append(_use(call, name, delta))
            self._missing[p] -= 1
            if not self._missing[p]:
                self._square(p)
        self._waiting += delta.nbytes
        if self._whole or self._waiting >= AT_ONCE:
            self._work()

    def finish(self) -> None:
        """No more gradients come: the values don't depend on what is missing."""
        for p in list(self._uses):
            self._square(p)
        self._work()

    def _wanted(self, call: Call) -> list[tuple[str, Tensor]]:
        own = call.layer._parameters.items()
        return [(name, p) for name, p in own if p is not None and p in self._sums]

    def _square(self, p: Tensor) -> None:
        self._pieces += per_sample.squares(self._uses.pop(p), self._sums[p], max_bytes=self._max_bytes)

    def _work(self) -> None:
        pieces, self._pieces, self._waiting = self._pieces, [], 0
        threads.share(lambda piece: piece(), pieces, self._device)


def _use(call: Call, name: str, delta: Tensor) -> per_sample.Use:
    """What went into a call and what came back."""
    if per_sample.kind_of(call.layer) == "embedding":
        a = call.input.reshape(len(delta), -1)
    else:
        a = _3d(call.input).to(delta.dtype)  # what autocast has a Linear compute in
    return call.layer, name, a, _3d(delta)


def _3d(tensor: Tensor) -> Tensor:
    """(B, features) or (B, …, features) → (B, T, features)."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])
