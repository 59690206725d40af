"""An additive coupling: a change of a token's features that can be undone whatever it computes.

    y₁ = x₁ + F(x₂),  y₂ = x₂ + G(y₁)        and back        x₂ = y₂ − G(y₁),  x₁ = y₁ − F(x₂)

Here the change stands where a model's blocks begin, and its inverse before the output embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor.parts.added import Added
from pefttutor.parts.attachment import added_key
from pefttutor.parts.entrance import entrance
from pefttutor.parts.streams import hidden_states, token_table

__all__ = ["Coupling", "Ends", "coupled", "ends", "uncoupled"]

WHAT = "InvertibleAdapter changes what goes in for a text's"

# ---- the formula


def coupled(x: Tensor, f: Sequence[Tensor], g: Sequence[Tensor]) -> Tensor:
    """y₁ = x₁ + F(x₂), y₂ = x₂ + G(y₁). f, g: W_d, b_d, W_u and b_u of F and of G. Shapes: (…, d) → (…, d).

    >>> x, f, g = torch.tensor([1.0, 2.0]), *([torch.ones(1, 1), torch.zeros(1)] * 2 for _ in "fg")
    >>> coupled(x, f, g), uncoupled(coupled(x, f, g), f, g)                 # 1 + 2, and 2 + 3
    (tensor([3., 5.]), tensor([1., 2.]))
    """
    x1, x2 = x.chunk(2, -1)
    y1 = x1 + _network(x2, *f)
    return torch.cat([y1, x2 + _network(y1, *g)], -1)


def uncoupled(y: Tensor, f: Sequence[Tensor], g: Sequence[Tensor]) -> Tensor:
    """What `coupled` has made y of. Shapes: (…, d) → (…, d)."""
    y1, y2 = y.chunk(2, -1)
    x2 = y2 - _network(y1, *g)
    return torch.cat([y1 - _network(x2, *f), x2], -1)


def _network(x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
    return F.linear(F.linear(x, down, down_bias).relu(), up, up_bias).to(x.dtype)


# ---- where it stands


@dataclass(frozen=True)
class Ends:
    """Where a model's blocks begin, by the names of the first ones, their width, and its output embeddings or None."""

    firsts: Mapping[str, nn.Module]
    width: int
    head: nn.Module | None


class Coupling(Added):
    """F and G, which lie in the first block, and what is done with them there and at the head."""

    rank: ClassVar[int] = 1  # see `Hooked`: after virtual tokens, which pass it as words do

    def __init__(self, found: Ends, name: str, tensors: Mapping[str, Tensor]) -> None:
        path, block = next(iter(found.firsts.items()))
        like = next(p for p in block.parameters() if p.is_floating_point())
        wide = torch.promote_types(like.dtype, torch.float32)  # small steps would be rounded away in a half
        held = {added_key(key, name): nn.Parameter(t.to(like.device, wide)) for key, t in tensors.items()}
        super().__init__((block, path, key, parameter) for key, parameter in held.items())
        self.firsts, self.head = tuple(found.firsts.values()), found.head

    def networks(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """F and G, where x is and as wide as it."""
        tensors = [p.to(x) for p in self.trained()]
        return tensors[:4], tensors[4:]

    def check_head(self, model: Any, args: Any, kwargs: Any) -> None:
        """Before the model runs. Raises: ValueError if its head is another one now, where nothing is taken back."""
        if model.get_output_embeddings() is not self.head:
            raise ValueError(
                f"the output embeddings of this {type(model).__name__} aren't those before which InvertibleAdapter "
                "takes its change back: they were replaced after attaching, as resize_token_embeddings does where the "
                "head isn't tied. Replace them first and attach then; what was learned can be copied by the "
                "parameters' names."
            )

    def enter(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before a first block runs."""
        x = hidden_states(args, kwargs)
        return hidden_states(args, kwargs, coupled(x, *self.networks(x)))

    def leave(self, head: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before the output embeddings run."""
        return hidden_states(args, kwargs, self.taken_back(hidden_states(args, kwargs)))

    def taken_back(self, y: Tensor) -> Tensor:
        """What output embeddings read where the blocks give y; a model without any asks for it, if it needs it."""
        return uncoupled(y, *self.networks(y))

    def covers(self, module: nn.Module) -> bool:
        return self.on and any(module is block for block in self.firsts)

    def trace(self, layer: nn.Module, x: Any, tape: Any, kind: str) -> Any:
        return self._traced(x, tape, kind) if self.covers(layer) else None

    def trace_into(self, layer: nn.Module, x: Any, tape: Any, kind: str) -> Any:
        return self._traced(x, tape, kind) if self.on and layer is self.head else x

    def _traced(self, x: Any, tape: Any, kind: str) -> Any:
        """What both networks read is kept, the first half of it as a view of x, and what both ReLUs give."""
        learns, half = tape.trains(*self.trained()), x.width // 2
        m, rounded = len(self.trained()[1]), self.trained()[0].element_size() != x.itemsize
        read = x.view(width=half)
        for _ in "FG":
            narrow = tape.activation("relu", tape.linear(read, m, kind, weight=learns, bias=learns), kind)
            for _ in range(rounded * (read.grad + narrow.grad)):  # of each matrix a copy as narrow as x
                tape.save(x.like(rows=half, width=m), kind)
            read = x.like(tape.linear(narrow, half, kind, weight=learns, bias=learns), width=half)
        return x.like(read, width=x.width)


def ends(model: Any) -> Ends:
    """Where the change and its inverse belong, as a trial has shown; without values, as is usual.

    Raises: ValueError for a model in which they don't.
    """
    get: Any = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    found, kind = entrance(model, WHAT, [] if head is None else [head]), type(model).__name__
    width = next(iter(found.widths.values()))
    if found.read is None:
        return Ends(found.firsts, _even(width, kind), head)
    if head is not None:
        (calls,), out, words = found.read, getattr(head, "out_features", None), len(token_table(model, WHAT))
        if {*calls, *found.widths.values()} != {width} or len(calls) != 1 or out != words:
            raise ValueError(
                f"its inverse stands before output embeddings as wide as the blocks, and those of this {kind} read "
                f"{calls or 'nothing'} and give {out} features, with {words} tokens and blocks of the width {width}. "
                "Adapter changes the blocks alone; or attach it to the body, model.base_model, for a task that "
                "predicts no words."
            )
    return Ends(found.firsts, _even(width, kind), head)


def _even(width: int, kind: str) -> int:
    if width % 2:
        raise ValueError(
            f"{WHAT} tokens, half by half, and the blocks of this {kind} are {width} features wide; expected an even "
            "number. Adapter has no halves."
        )
    return width
