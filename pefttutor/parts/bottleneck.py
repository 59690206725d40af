"""A bottleneck beside what a layer gives: down to few features, a nonlinearity, and up again.

A(h) = s · (σ(h W_dᵀ + b_d) W_uᵀ + b_u)          W_d (m, d), W_u (d, m)

serial      y = f(x) + A(f(x))
parallel    y = f(x) + A(x₀)            x₀ is what another layer reads, where the sublayer begins
at a norm   y = N(z + A(N(z)))          f is the norm N that follows the residual sum z
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor.parts.attachment import added_key
from pefttutor.parts.layer_change import Compute, LayerChange
from pefttutor.parts.linear import sizes
from pefttutor.parts.norms import is_norm
from pefttutor.parts.weight_delta import beside

__all__ = ["ACTIVATIONS", "Bottleneck", "Noted", "draw_projections", "width_of"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
KEYS = ("adapter_down", "adapter_down_bias", "adapter_up", "adapter_up_bias")


def width_of(layer: nn.Module) -> int:
    """How many features a linear layer or a norm gives.

    >>> width_of(nn.Linear(3, 5)), width_of(nn.LayerNorm(8))
    (5, 8)
    """
    if is_norm(layer):
        return next(layer.parameters()).numel()  # its author may call it scale or gamma
    return sizes(layer)[1]


def draw_projections(
    width: int, bottleneck: int, generator: torch.Generator, std: float | None = None
) -> dict[str, Tensor]:
    """W_d and b_d as in a new `nn.Linear`, W_u and b_u zero; with `std`, both W normal within ± 2 std, and b zero.

    They come by their keys, and are drawn on the CPU, so that every device gets the same.

    Shapes: → (m, d), (m), (d, m), (d).
    """
    down, up = torch.empty(bottleneck, width, device="cpu"), torch.zeros(width, bottleneck, device="cpu")
    down_bias, up_bias = torch.zeros(bottleneck, device="cpu"), torch.zeros(width, device="cpu")
    if std is None:
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        down_bias.uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)
    else:
        for weight in (down, up):
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
    return dict(zip(KEYS, (down, down_bias, up, up_bias), strict=True))


class Noted:
    """What a layer was called with last, for another one to read: a hook before its forward (see `parts.streams`).

    It isn't copied or pickled along: it belongs to one forward pass.
    """

    value: Tensor | None = None  # (…, d)

    def __init__(self, path: str) -> None:
        self.path = path

    def note(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        self.value = args[0] if args else next(iter(kwargs.values()))

    def take(self) -> Tensor:
        """The value, once. Raises: RuntimeError if the layer wasn't called since."""
        value, self.value = self.value, None
        if value is None:
            raise RuntimeError(
                f"a parallel adapter reads the input of {self.path!r}, which wasn't called before it: name in "
                "input_modules a layer of the same sublayer."
            )
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}


class Bottleneck(LayerChange):
    """One bottleneck adapter on a layer that gives d features.

    Cost: 2·m·d + m + d values and 4·m·d FLOPs a token; it can't be folded into a weight.
    """

    makes = False  # whether `projections` makes them in each call

    def __init__(
        self,
        path: str,
        layer: nn.Module,
        name: str,
        tensors: Mapping[str, Tensor],
        *,
        activation: str,
        scaling: float = 1.0,
        source: Noted | None = None,
    ) -> None:
        """`tensors`: those of `projections`, or what makes them, by their keys. `source`: what a parallel adapter
        reads; None lets it read what the layer gives."""
        self.activation, self.scaling, self.source, self.at_norm = activation, scaling, source, is_norm(layer)
        self.width = width_of(layer)
        self.bottleneck = next(len(t) for key, t in tensors.items() if key.endswith("down_bias"))
        added = beside(layer, {key: nn.Parameter(value) for key, value in tensors.items()})
        super().__init__(path, layer, name, {added_key(key, name): p for key, p in added.items()})

    def describe(self) -> str:
        return f"{self.name}: bottleneck={self.bottleneck}, scaling={self.scaling:g}"

    def projections(self) -> Sequence[Tensor]:
        """W_d (m, d), b_d (m), W_u (d, m) and b_u (d)."""
        return self.trained()

    def branch(self, h: Tensor) -> Tensor:
        """A(h) = s · (σ(h W_dᵀ + b_d) W_uᵀ + b_u). Shapes: (…, d) → (…, d)."""
        down, down_bias, up, up_bias = (each.to(h.dtype) for each in self.projections())
        narrow = ACTIVATIONS[self.activation](F.linear(h, down, down_bias))  # (…, m)
        return self.scaling * F.linear(narrow, up, up_bias)

    def forward(self, inner: Compute, own: bool, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = inner(x, *args, **kwargs)
        if self.at_norm:
            return inner(x + self.branch(y).to(x.dtype), *args, **kwargs)
        return y + self.branch(y if self.source is None else self.source.take()).to(y.dtype)

    def check_foldable(self) -> None:
        raise ValueError(
            "a bottleneck adapter has a nonlinearity, which no weight can hold; leave it attached."
        )

    def folded_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise ValueError(
            f"{self.path!r} has the bottleneck adapter {self.name!r}, whose nonlinearity no weight can hold, and what "
            "comes after it builds on that weight, as DoRA does: attach that one first, or switch the adapter off."
        )

    def trace(self, layer: nn.Module, x: Any, tape: Any, kind: str) -> Any:
        """What goes into both projections is kept, and what the nonlinearity needs; a norm is run by itself."""
        if layer is not self.layer or self.at_norm:
            return None
        item = layer.weight.element_size() if isinstance(layer, nn.Embedding) else x.itemsize
        y = x.like(width=self.width, itemsize=item)
        source = y if self.source is None else y.like()
        learns = tape.trains(*self.trained())
        narrow = tape.linear(source, self.bottleneck, kind, weight=learns, bias=learns)
        narrow = tape.activation(self.activation, narrow, kind)
        tape.linear(narrow, self.width, kind, weight=learns, bias=learns)
        if self.makes or self.trained()[0].element_size() != y.itemsize:  # the projections, made or rounded
            for _ in range(narrow.grad + source.grad):  # W_u, and W_d, which is as large, for what flows on
                tape.save(y.like(rows=self.width, width=self.bottleneck), kind)
        return y.like(grad=y.grad or learns)
