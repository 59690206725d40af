"""Gates: a number between 0 and 1 that says how much of a change a text, or one of its tokens, gets.

    g = mean σ(w · x + b)          over a text's tokens x, or of each token for itself

A layer's gate lies beside what it weighs, as a weight w (d) and a bias b (1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor.parts.added import Added
from pefttutor.parts.attachment import added_key
from pefttutor.parts.bottleneck import Bottleneck
from pefttutor.parts.layer_change import Compute
from pefttutor.parts.linear import sizes
from pefttutor.parts.lowrank_layer import LowRank
from pefttutor.parts.streams import hidden_states, named_arguments
from pefttutor.parts.weight_delta import WeightDelta

__all__ = ["GatedBottleneck", "GatedLowRank", "PrefixGate", "PrefixGates", "Tokens", "drawn_gate"]


def drawn_gate(key: str, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """w normal with 0.02, and b within ± 1/√d, so that a gate starts about half open. Shapes: → (d), (1)."""
    weight, bias = torch.empty(width, device="cpu"), torch.empty(1, device="cpu")
    weight.normal_(0, 0.02, generator=generator)
    bias.uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)
    return {f"{key}_gate_weight": nn.Parameter(weight), f"{key}_gate_bias": nn.Parameter(bias)}


@dataclass(eq=False)
class Tokens:
    """Which tokens a gate is the mean of: those of its text, without padding, as the model's mask says.

    alone: whether each token has its own gate instead. It isn't copied or pickled along what a call has said.
    """

    alone: bool
    mask: Tensor | None = field(default=None, repr=False)  # (batch, seq)
    rank: ClassVar[int] = 1  # see `Hooked`: after virtual tokens, which have gates too, and before a prefix

    def note(self, body: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the body runs."""
        mask = named_arguments(body, args, kwargs).get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def gate(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """mean σ(w · x + b). Shapes: (batch, seq, d) → (batch, 1, 1), or (batch, seq, 1)."""
        g = torch.sigmoid(F.linear(x, weight[None].to(x.dtype), bias.to(x.dtype)))
        if self.alone or x.dim() < 3:
            return g
        if self.mask is None or self.mask.shape != x.shape[:-1]:
            return g.mean(tuple(range(1, g.dim() - 1)), keepdim=True)  # of a picture, over all its places
        real = self.mask.to(g)[..., None]
        return (g * real).sum(-2, keepdim=True) / real.sum(-2, keepdim=True).clamp(min=1)

    def __getstate__(self) -> dict[str, Any]:
        return {"alone": self.alone, "mask": None}


class GatedLowRank(LowRank):
    """y = f(x) + g(x) · B A x: the gate in the place of lora_alpha / r."""

    additive = stored = False  # it is no change of the weight

    def __init__(self, *args: Any, gate: Mapping[str, Tensor], tokens: Tokens, **how: Any) -> None:
        super().__init__(*args, **how, beside=gate)
        self.tokens = tokens

    def forward(self, inner: Compute, own: bool, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return WeightDelta.forward(self, inner, own, x, *args, **kwargs)

    def product(self, x: Tensor) -> Tensor:
        A, B = (factor.to(x.dtype) for factor in self.factors)
        g = self.tokens.gate(x, *self.trained()[2:])
        return F.linear(g * F.linear(x, A), B)

    def check_foldable(self) -> None:
        raise ValueError("a gate depends on the text, which no weight can hold; leave it attached.")

    def folded_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise ValueError(
            f"{self.path!r} has the gated change {self.name!r}, which no weight can hold, and what comes after it "
            "builds on that weight, as DoRA does: attach that one first, or switch the gated one off."
        )

    def trace(self, layer: nn.Module, x: Any, tape: Any, kind: str) -> Any:
        """x Aᵀ before and after its gate."""
        if layer is not self.layer:
            return None
        n_out, learns = sizes(layer)[1], tape.trains(*self.trained())
        narrow = tape.linear(x, self.r, kind, weight=learns)
        if narrow.grad:
            tape.save(narrow, kind)
            tape.save(x.like(width=1), kind)  # σ's own output
        y = tape.linear(narrow.like(), n_out, kind, weight=learns)
        rounded = y.grad and self.trained()[0].element_size() != x.itemsize
        for width in (x.width, n_out) if rounded else ():
            tape.save(x.like(rows=self.r, width=width), kind)
        return y


class GatedBottleneck(Bottleneck):
    """A bottleneck adapter whose output is multiplied with the gate of what it reads."""

    def __init__(self, *args: Any, tokens: Tokens, **how: Any) -> None:
        super().__init__(*args, **how)
        self.tokens = tokens

    def projections(self) -> list[Tensor]:
        return list(self.trained()[:4])

    def branch(self, h: Tensor) -> Tensor:
        return self.tokens.gate(h, *self.trained()[4:]) * super().branch(h)

    def trace(self, layer: nn.Module, x: Any, tape: Any, kind: str) -> Any:
        """What an adapter keeps, its output, and the gate."""
        y = super().trace(layer, x, tape, kind)
        if y is not None and y.grad:
            tape.save(y.like(), kind)
            tape.save(y.like(width=1), kind)
        return y


class PrefixGates(Added):
    """The gates of a prefix, one in each attention, which is called with the hidden states."""


@dataclass(eq=False)
class PrefixGate:
    """A hook before an attention: what its prefix is multiplied with in this call."""

    name: str
    tokens: Tokens
    value: Tensor | None = field(default=None, repr=False)  # (batch, 1, 1)

    def note(self, attention: nn.Module, args: Any, kwargs: Any) -> None:
        keys = (added_key(f"prefix_gate_{x}", self.name) for x in ("weight", "bias"))
        self.value = self.tokens.gate(
            hidden_states(args, kwargs), *(attention.get_parameter(key) for key in keys)
        )

    def __call__(self) -> Tensor:
        assert self.value is not None
        return self.value

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "tokens": self.tokens, "value": None}
