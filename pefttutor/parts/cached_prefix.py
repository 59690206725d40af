"""Frozen blocks computed once: what they put out is kept for each batch, and played back in every later epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.parts.blocks import blocks

__all__ = ["CachedPrefix"]


class CachedPrefix:
    """The leading blocks of a model in which nothing trains, and a way to skip them.

        prefix = CachedPrefix(model)
        kept = [prefix.compute(batch) for batch in batches]            # once
        with prefix.skipped(kept[i]):
            loss = model(**batches[i]).loss                            # the same number, without those blocks

    Right only while the prefix is a fixed function: in evaluation mode or without dropout.

    Cost: keeps (batch, seq, d) a batch; saves the prefix's forward pass in every epoch but one.
    Raises: ValueError if the first block trains; and in `compute`, if something that it depends on does.
    """

    def __init__(self, model: nn.Module) -> None:
        name, self.stack = blocks(model)
        trains = [any(p.requires_grad for p in block.parameters()) for block in self.stack]
        self.depth = trains.index(True) if any(trains) else len(trains)
        if self.depth == 0:
            raise ValueError(f"no block can be skipped: {name}.0 trains. Freeze it and what lies below.")
        self.model, self.name = model, name

    def compute(self, batch: Mapping[str, Any]) -> Any:
        """What the last frozen block puts out for a batch, without a gradient.

        Raises: ValueError if it depends on something that trains, and so isn't the same in every epoch.
        """
        kept: list[Any] = []
        handle = self.stack[self.depth - 1].register_forward_hook(
            lambda block, args, output: kept.append(output)
        )
        try:
            with torch.enable_grad():
                self.model(**batch)
        finally:
            handle.remove()
        several = isinstance(kept[0], tuple)
        parts = kept[0] if several else (kept[0],)
        if any(isinstance(part, Tensor) and part.requires_grad for part in parts):
            raise ValueError(
                f"what {self.name}.{self.depth - 1} puts out can't be kept: something below it trains, such as the "
                "embeddings or an encoder. Freeze that (and compute before gradient checkpointing is switched on)."
            )
        parts = tuple(part.detach() if isinstance(part, Tensor) else part for part in parts)
        return parts if several else parts[0]

    @contextmanager
    def skipped(self, output: Any) -> Iterator[None]:
        """Within the block, the frozen blocks aren't run: `output` stands for what they give."""
        real = list(self.stack)[: self.depth]
        try:
            for i in range(self.depth):
                self.stack[i] = _Played(output)
            yield
        finally:
            for i, block in enumerate(real):
                self.stack[i] = block


class _Played(nn.Module):
    """Gives what a block has given, whatever goes in."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.output

    def __getattr__(self, name: str) -> Any:
        # Some models ask a block what kind of attention it has before calling it.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return None
