"""Virtual tokens that take the places of a placeholder in the text: anywhere in a template, none longer than it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pefttutor.parts.network import Itself, Made, Maker, Network
from pefttutor.parts.streams import Hooked, cache_made, named_arguments, seen_before
from pefttutor.parts.virtual_tokens import reading_body

__all__ = ["put_in_places"]

MARK = "_pefttutor_places"  # of a cache that doesn't count what it holds, once it holds a text's beginning


class Placed(Made):
    """What makes the virtual tokens, kept in the model's body."""

    def covers(self, module: nn.Module) -> bool:
        return self.on and any(module is body for body, _ in self.places.values())


def put_in_places(
    model: Any,
    count: int,
    make: Itself | Network,
    tensors: Mapping[str, Tensor],
    *,
    placeholder: int,
    what: str,
) -> list[Any]:
    """The parts that let `model` read virtual tokens where a text has the token `placeholder`, in their order.

    make, tensors, what: as in `virtual_tokens.put_before`.

    Shapes: make → (count, d), d the width of the token embeddings.
    Raises: ValueError as `reading_body`, and for a token that the vocabulary doesn't have.
    """
    body, path = reading_body(model, what)
    table = body.get_input_embeddings()
    if placeholder >= len(table.weight):
        raise ValueError(
            f"placeholder_token_id is {placeholder}; expected one of the {len(table.weight)} tokens of this model."
        )
    maker = Maker(make)
    places = _Places(count, placeholder, maker)
    added = Placed([(body, path, key, tensor) for key, tensor in tensors.items()], maker)
    return [added, Hooked([(body, places.read)], after=[(table, places.embed), (body, places.end)])]


@dataclass(eq=False)
class _Places:
    """What happens to each call of the body. It holds no module, so that a copied model is free of the original.

    now: the virtual tokens of this call, or None where it has no place for them.
    """

    count: int
    token: int
    make: Maker
    now: Tensor | None = field(default=None, repr=False)
    rank: ClassVar[int] = 1  # see `Hooked`: virtual tokens before a text are there already

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"now": None}  # a copy is in no call

    def read(self, body: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before the body runs: each text has as many places as there are virtual tokens, or goes on behind them.

        A placeholder after these is a word that the model has written.
        """
        self.now = None
        named = named_arguments(body, args, kwargs)
        ids = named.get("input_ids")
        if ids is None:
            raise ValueError(
                f"PTuning looks for the token {self.token} in input_ids, and the model was called without them: give "
                "it input_ids, not inputs_embeds."
            )
        cache, filled = seen_before(named)
        if filled or (filled is None and vars(cache).get(MARK, False)):
            return  # behind the places, which the cache holds
        found = (ids == self.token).sum(1)
        if bool((found < self.count).any()):
            raise ValueError(
                f"the token {self.token} stands in the texts of this batch {found.tolist()} times; expected "
                f"{self.count} in each, one for each virtual token."
            )
        self.now = self.make(body)
        if filled is None:
            vars(cache)[MARK] = True

    def embed(self, table: nn.Module, args: Any, output: Tensor) -> Tensor:
        """After the words are embedded: the k-th place of a text gets the k-th virtual token."""
        if self.now is None:
            return output
        nth = (args[0] == self.token).long().cumsum(1).sub(1)
        here = (args[0] == self.token) & (nth < self.count)
        return torch.where(here[..., None], self.now.to(output.dtype)[nth.clamp(0, self.count - 1)], output)

    def end(self, body: nn.Module, args: Any, output: Any) -> None:
        """After the body has run: whatever else embeds words gets them as they are."""
        self.now = None
        cache = cache_made(output)
        if cache is not None:
            vars(cache)[MARK] = True
