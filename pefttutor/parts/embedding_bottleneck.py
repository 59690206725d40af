"""A bottleneck over what goes into a model's blocks, which reads it through a norm of its own.

x ← x + W_u ReLU(W_d LN(x) + b_d) + b_u          W_d (m, d), W_u (d, m);  LN has a scale and a shift, ε = 10⁻⁶
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor.parts.added import Added
from pefttutor.parts.attachment import added_key
from pefttutor.parts.streams import hidden_states

__all__ = ["EmbeddingBottleneck"]

KEYS = (
    "embedding_norm",
    "embedding_norm_bias",
    "embedding_down",
    "embedding_down_bias",
    "embedding_up",
    "embedding_up_bias",
)
EPS = 1e-6


class EmbeddingBottleneck(Added):
    """One for each stack of blocks, in its first block.

    Shapes: LN's scale and shift (d), W_d (m, d), b_d (m), W_u (d, m), b_u (d).
    """

    rank: ClassVar[int] = 1  # see `Hooked`: after virtual tokens, which pass it as words do

    def __init__(
        self, firsts: Mapping[str, nn.Module], name: str, drawn: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """firsts: the first blocks by name. drawn: for each W_d, b_d, W_u and b_u, as of `draw_projections`."""
        self.keys = tuple(added_key(key, name) for key in KEYS)
        places = []
        for path, block in firsts.items():
            down, down_bias, up, up_bias = drawn[path].values()
            start = torch.ones_like(up_bias), torch.zeros_like(up_bias), down, down_bias, up, up_bias
            like = next(p for p in block.parameters() if p.is_floating_point())
            wide = torch.promote_types(
                like.dtype, torch.float32
            )  # small steps would be rounded away in a half
            for key, value in zip(self.keys, start, strict=True):
                places.append((block, path, key, nn.Parameter(value.to(like.device, wide))))
        super().__init__(places)
        self.firsts = tuple(firsts.values())

    def enter(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before a first block runs."""
        x = hidden_states(args, kwargs)
        scale, shift, down, down_bias, up, up_bias = (getattr(block, key).to(x) for key in self.keys)
        narrow = F.linear(F.layer_norm(x, x.shape[-1:], scale, shift, EPS), down, down_bias).relu()
        return hidden_states(args, kwargs, x + F.linear(narrow, up, up_bias).to(x.dtype))

    def covers(self, module: nn.Module) -> bool:
        return self.on and any(module is block for block in self.firsts)

    def trace(self, layer: nn.Module, x: Any, tape: Any, kind: str) -> Any:
        """What the norm and both projections read, and what the ReLU gives."""
        if not self.covers(layer):
            return None
        own = [getattr(layer, key) for key in self.keys]
        learns, m = tape.trains(*own), len(own[3])
        read = x.like(grad=x.grad or learns)
        if read.grad:
            tape.save(x, kind)
            tape.save(
                x.like(width=2, itemsize=x.itemsize if tape.device == "cpu" else 4), kind
            )  # mean and 1/σ
        narrow = tape.activation("relu", tape.linear(read, m, kind, weight=learns, bias=learns), kind)
        tape.linear(narrow, x.width, kind, weight=learns, bias=learns)
        if read.grad and own[0].element_size() != x.itemsize:  # the norm's two and both matrices, rounded
            for rows in (1, 1, m, m):
                tape.save(x.like(rows=rows), kind)
        return x.like(grad=read.grad)
