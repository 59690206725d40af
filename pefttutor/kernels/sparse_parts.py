"""Chosen entries of tensors as vectors, and which of them a thread takes at a time, for the sparse optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.kernels import threads
from pefttutor.kernels.flat_entries import read, sorted_places, write

__all__ = ["Part", "lots_of", "parts_of", "usual_way"]

PART = 1 << 21  # entries of a tensor: more are several parts, so that threads can share a large tensor
FEW = 1 << 16  # entries: with fewer in all, starting threads takes longer than working alone
FUSED = ("cpu", "cuda")  # where torch (2.11) has a fused step


@dataclass(frozen=True)
class Part:
    """Some of a tensor's chosen entries, and the vector that an optimizer trains in their place."""

    weight: Tensor
    index: Tensor
    values: nn.Parameter

    def check(self) -> None:
        now, then = self.weight, self.values
        if now.dtype != then.dtype or now.device != then.device:
            raise ValueError(
                f"a tensor {tuple(now.shape)} is {now.dtype} on {now.device} and was {then.dtype} on {then.device} "
                "when the optimizer was made; make the optimizer after converting the model"
            )

    def gather(self) -> None:
        torch.index_select(self.weight.detach().view(-1), 0, self.index, out=self.values.data)
        assert self.weight.grad is not None  # see _OnChosen.step
        self.values.grad = read(self.weight.grad, self.index)

    def scatter(self) -> None:
        write(self.weight, self.index, self.values)
        self.values.grad = None


def parts_of(chosen: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Part]:
    pairs = [_checked(item) for item in chosen]
    if len({id(weight) for weight, _ in pairs}) < len(pairs):
        raise ValueError("a tensor is given twice; give it once, with all of its chosen entries")
    for weight, index in pairs:
        for some in index.split(PART):
            yield Part(weight, some, nn.Parameter(read(weight, some)))


def lots_of(parts: list[Part]) -> list[list[Part]]:
    """The parts, in a lot for each thread, all with about as many entries; in one where threads gain nothing."""
    entries = sum(part.index.numel() for part in parts)
    alone = entries < FEW or any(threads.short_way(part.weight.device) for part in parts)
    lots: list[list[Part]] = [[] for _ in range(1 if alone else min(len(parts), torch.get_num_threads()))]
    sizes = [0] * len(lots)
    for part in sorted(parts, key=lambda part: -part.index.numel()):  # the large ones first
        smallest = sizes.index(min(sizes))
        lots[smallest].append(part)
        sizes[smallest] += part.index.numel()
    return lots


def _checked(pair: Any) -> tuple[Tensor, Tensor]:
    """Raise unless this is a tensor and places of it, each once; they get sorted: that reads memory in order."""
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair)):
        raise ValueError(
            f"a {type(pair).__name__} is given, expected pairs (tensor, index of its chosen entries); all have the "
            "same settings: for parameter groups make an optimizer for each"
        )
    weight, index = pair
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"an index is {tuple(index.shape)} of {index.dtype}, expected the flat places (k) as int32 or int64; "
            "of a boolean mask that is mask.flatten().nonzero().squeeze(1)"
        )
    if not weight.is_contiguous():
        raise ValueError(f"a tensor {tuple(weight.shape)} isn't contiguous; call contiguous() first")
    return weight, sorted_places(index, weight)


def usual_way(parts: list[Part]) -> dict[str, bool]:
    """How torch makes a step, unless the user says: on a GPU fused, in one pass where its own choice makes a dozen."""
    devices = {part.weight.device for part in parts}
    fused = all(device.type in FUSED and threads.short_way(device) for device in devices)
    return {"fused": True} if devices and fused else {}
