"""A change that is added to the weight of one layer, made of small tensors beside it; the layer's own stays as it is.

W' = W + ΔW
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor.parts.attachment import added_key
from pefttutor.parts.layer_change import Compute, LayerChange
from pefttutor.parts.linear import transposed

__all__ = ["WeightDelta", "beside"]


def beside(layer: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the layer's device, parameters as such, and at least in float32.

    Also next to a half-precision weight: small steps would be rounded away otherwise.
    """
    weight = next(iter([*layer.parameters(), *layer.buffers(), *tensors.values()]))
    given = weight.dtype if weight.is_floating_point() else torch.float32
    dtype = torch.promote_types(given, torch.float32)
    placed = {}
    for key, tensor in tensors.items():
        moved = tensor.detach().to(weight.device, dtype if tensor.is_floating_point() else tensor.dtype)
        placed[key] = nn.Parameter(moved) if isinstance(tensor, nn.Parameter) else moved
    return placed


class WeightDelta(LayerChange):
    """y = f(x) + s · G drop(x),   ΔW = s · G          x (…, in) → y (…, out)

    A kind of it says `product` (G x), which needs no matrix as large as the weight, and `delta` (ΔW).
    """

    additive = True
    stored = False  # whether ΔW has factors A and B that are the very tensors that are held

    def __init__(
        self,
        path: str,
        layer: nn.Module,
        name: str,
        tensors: Mapping[str, Tensor],
        *,
        scaling: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        """tensors: by their key; parameters train, others are buffers."""
        self.scaling, self.dropout = scaling, dropout
        self.transposed, self.words = transposed(layer), isinstance(layer, nn.Embedding)
        added = {added_key(key, name): tensor for key, tensor in beside(layer, tensors).items()}
        super().__init__(path, layer, name, added)

    def held(self, key: str) -> Tensor:
        """One of the tensors that this change has added to the layer."""
        return getattr(self.layer, added_key(key, self.name))

    def describe(self) -> str:
        return f"{self.name}: scaling={self.scaling:g}, merged={self.folded}"

    def forward(self, inner: Compute, own: bool, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = inner(x, *args, **kwargs)
        change = self.product(F.dropout(x, self.dropout) if self.drops else x)
        return y + (self.scaling * change).to(y.dtype)

    @property
    def drops(self) -> bool:
        """Whether the change sees a part of its input at the moment; words aren't dropped."""
        return self.dropout > 0 and not self.words and self.layer.training

    def product(self, x: Tensor) -> Tensor:
        """G x. Shapes: (…, in) → (…, out)."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """ΔW = s · G, at least in float32. Shapes: → (out, in)."""
        raise NotImplementedError

    def touched(self) -> list[Tensor]:
        weight = self.layer._parameters.get("weight")
        return [] if weight is None else [weight]

    def folded_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.delta().to(weight.dtype), bias
