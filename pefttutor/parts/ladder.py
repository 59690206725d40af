"""A ladder: what a side network reads of a model's blocks in a call, and how it speaks in their place.

Hooks take down what each block is called with and what it says. When the model's blocks are done, the side network
runs, with a cache of its own, which that of the model carries along.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor.data.trial import trying
from pefttutor.parts.attachment import added_key
from pefttutor.parts.beside import caches_beside, carry
from pefttutor.parts.side_network import Side, Stack
from pefttutor.parts.streams import (
    CACHES,
    Hooked,
    hidden_states,
    named_arguments,
    said_by,
    said_instead,
    seen_before,
)

__all__ = ["Ladder", "Reading", "Rung"]

HELD = (*CACHES, "layer_past", "past_key_value")  # what blocks call their cache


class Reading(Hooked):
    """The hooks of a ladder."""

    @property
    def ladder(self) -> Ladder:
        return self.hooks[0][1].__self__  # type: ignore[attr-defined]

    def kept_aside(self) -> list[Tensor]:
        return [*self.ladder.side.parameters(), *self.ladder.side.buffers()]


@dataclass(eq=False)
class Ladder:
    """What the side network is, and what it reads in a call of the model.

    stack: what the module around the blocks calls them. places: where each tensor lies, by its name: a block's index,
    or None for the module around, and the key.
    """

    prefix: str
    stack: str
    kept: tuple[int, ...]
    reduction: int
    temperature: float
    side: Side
    config: Any
    places: dict[str, tuple[int | None, str]] = field(default_factory=dict)
    filled: bool | None = False  # whether the cache held something before this call
    entered: Tensor | None = field(default=None, repr=False)
    calls: dict[int, dict[str, Any]] = field(default_factory=dict, repr=False)
    said: dict[int, Tensor] = field(default_factory=dict, repr=False)
    rank: ClassVar[int] = 1  # see `Hooked`: after virtual tokens, which its blocks get too

    def held(
        self, found: Stack, name: str, values: dict[str, Tensor]
    ) -> list[tuple[nn.Module, str, str, Tensor]]:
        """All that trains, each with the module that holds it: the block that it stands beside, or that around."""
        held: list[tuple[nn.Module, str, str, Tensor]] = []
        for own, value in values.items():
            block, label = self._place(own, found.after)
            key = added_key(f"lst_{label.replace('.', '_')}", name)
            module = found.around if block is None else found.blocks[block]
            path = found.path.rpartition(".")[0] if block is None else f"{found.path}.{block}"
            like = next(module.parameters())
            wide = torch.promote_types(like.dtype, torch.float32)
            held.append((module, path, key, nn.Parameter(value.to(like.device, wide))))
            self.places[own] = block, key
        return held

    def _place(self, own: str, after: tuple[str, ...]) -> tuple[int | None, str]:
        """The block beside which a tensor stands, or None, and what it is called there."""
        room, _, rest = own.partition(".")
        if room in ("first", "up"):
            return None, own
        index, _, rest = rest.partition(".")
        if room == "after":
            return None, f"{after[int(index)]}.{rest}"
        return self.kept[int(index)], rest if room == "blocks" else f"{room}.{rest}".strip(".")

    def note(self, around: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the blocks run."""
        self.calls, self.said, self.entered = {}, {}, None
        cache, self.filled = seen_before(named_arguments(around, args, kwargs))
        if any(hasattr(layer, "max_cache_len") for layer in getattr(cache, "layers", ())):
            raise ValueError(
                "LST's side network has a cache of its own, and this one is of fixed length: in generate leave "
                "cache_implementation out."
            )

    def enter(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        self.entered = hidden_states(args, kwargs).detach()

    def speak(self, around: Any, args: Any, output: Any) -> Any:
        """After the blocks have run: what the side network makes of what they said, in the place of that."""
        entered, calls, said = self.entered, self.calls, self.said
        self.entered, self.calls, self.said = None, {}, {}
        if entered is None or set(said) != set(self.kept):
            raise ValueError("LST reads what every block says, and in this call some weren't run.")
        own = self.held_in(around)
        wide = own["up.weight"]
        own = {name: tensor.to(wide.device) for name, tensor in own.items()}

        def down(key: str, h: Tensor) -> Tensor:
            return F.linear(h.to(wide), own[f"{key}.weight"], own[f"{key}.bias"])

        cache = self._cache(calls[self.kept[0]])
        ends = range(len(self.kept))
        side: Side = self.side.train(around.training)
        given = {n: t for n, t in own.items() if n.startswith(("blocks.", "after."))}
        given |= {name: buffer.to(wide.device) for name, buffer in side.named_buffers()}
        s = torch.func.functional_call(
            side,
            given,
            (
                down("first", entered),
                [down(f"read.{i}", said[self.kept[i]]) for i in ends],
                [(own[f"gate.{i}"] / self.temperature).sigmoid() for i in ends],
                [self._narrow(calls[i], cache, wide) for i in self.kept],
            ),
        )
        return said_instead(output, F.linear(s, own["up.weight"], own["up.bias"]))

    def held_in(self, around: Any) -> dict[str, Tensor]:
        """What trains, by its name."""
        stack = getattr(around, self.stack)
        return {
            own: (around if block is None else stack[block]).get_parameter(key)
            for own, (block, key) in self.places.items()
        }

    def _cache(self, call: dict[str, Any]) -> Any:
        """The side network's own cache, which that of the model carries along; None without one."""
        cache = next((call[key] for key in HELD if call.get(key) is not None), None)
        if cache is None:
            return None
        beside = caches_beside(cache, self.prefix) if self.filled is not False else None
        if beside is None:
            if self.filled:
                raise ValueError(
                    "LST goes on from the caches of the model and of its side network, and this cache was filled "
                    "without it: compute the text's beginning with the adapted model too."
                )
            from transformers import DynamicCache

            beside = (DynamicCache(config=self.config),)
            carry(cache, self.prefix, beside)
        return beside[0]

    def _narrow(self, call: dict[str, Any], cache: Any, wide: Tensor) -> dict[str, Any]:
        """What a block was called with, for the narrow one beside it: its own cache, and every r-th angle."""
        r = self.reduction

        def moved(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(moved, value))
            if not isinstance(value, Tensor):
                return value
            return value.to(wide) if value.is_floating_point() else value.to(wide.device)

        found = {key: moved(value) for key, value in call.items()}
        angles = found.get("position_embeddings")
        if isinstance(angles, tuple):
            if any(each.shape[-1] % (2 * r) for each in angles):
                raise ValueError(
                    f"reduction is {r}; it must leave pairs of the {angles[0].shape[-1]} features of a head that a "
                    "position rotates"
                )
            halves = [each.chunk(2, -1) for each in angles]
            if trying() and not wide.is_meta and not all(torch.equal(*half) for half in halves):
                raise ValueError(
                    "the features that a position rotates together don't lie half a head apart, so that every r-th "
                    "leaves no pairs"
                )
            found["position_embeddings"] = tuple(each[..., ::r] for each in angles)
        return found | {key: cache for key in HELD if key in found and found[key] is not None}


@dataclass(eq=False)
class Rung:
    """One block of the model: what it is called with, and what it says."""

    ladder: Ladder
    index: int

    def enter(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        named = named_arguments(block, args, kwargs)
        own = hidden_states(args, kwargs)
        self.ladder.calls[self.index] = {key: value for key, value in named.items() if value is not own}

    def leave(self, block: nn.Module, args: Any, output: Any) -> None:
        said = said_by(output)
        assert said is not None
        self.ladder.said[self.index] = said.detach()
