"""Virtual tokens that take the places of a placeholder in the text: anywhere in a template, none longer than it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor.data.trial import trying
from pefttutor.parts.network import Itself, Made, Maker, Network
from pefttutor.parts.streams import Hooked, cache_made, hooked_by, named_arguments, seen_before
from pefttutor.parts.virtual_tokens import inserted, reading_body

__all__ = ["put_in_places"]


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
    note: str,
    what: str,
) -> list[Any]:
    """The parts that let `model` read virtual tokens where a text has the token `placeholder`, in their order.

    make, tensors, note, what: as in `virtual_tokens.put_before`.

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
    places = _Places(count, placeholder, maker, note)
    added = Placed([(body, path, key, tensor) for key, tensor in tensors.items()], maker)
    return [added, Hooked([(body, places.read)], after=[(table, places.embed), (body, places.end)])]


@dataclass(eq=False)
class _Places:
    """What happens to each call of the body. It holds no module, so that a copied model is free of the original.

    note: what a cache that holds the places is marked with. now: the virtual tokens of this call, and for each token of
    its texts the number of the one in its place, −1 of a word; None in a call that goes on behind the places.
    """

    count: int
    token: int
    make: Maker
    note: str
    now: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
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
        if any(isinstance(o, _Places) and o.token == self.token and o is not self for o in hooked_by(body)):
            raise ValueError(
                f"two attachments would put their virtual tokens in the places of the token {self.token}: switch one "
                "of them off, pefttutor.switch(model, …), or give it a token of its own."
            )
        cache, filled = seen_before(named)
        marked = cache is not None and vars(cache).get(f"_pefttutor_{self.note}", False)
        if filled and not marked:
            raise ValueError(
                f"this cache was filled without the places of the token {self.token}: compute the text's beginning "
                "with the adapted model too."
            )
        if marked and filled is not False:
            return  # behind the places, which the cache holds
        places = (ids == self.token) & ~inserted(body, ids)
        mask = named.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            places &= mask[:, -ids.shape[1] :].bool()  # padding is no place
        found = places.sum(1)
        if bool((found < self.count).any()):
            if trying():
                return
            raise ValueError(
                f"the token {self.token} stands in the texts of this batch {found.tolist()} times; expected "
                f"{self.count} in each, one for each virtual token."
            )
        nth = places.long().cumsum(1) * places
        self.now = self.make(body), nth * (nth <= self.count) - 1
        self._mark(cache)

    def embed(self, table: nn.Module, args: Any, output: Tensor) -> Tensor:
        """After the words are embedded: the k-th place of a text gets the k-th virtual token."""
        if self.now is None:
            return output
        virtual, nth = self.now
        nth = F.pad(nth, (0, output.shape[1] - nth.shape[1]), value=-1)  # Longformer pads to its window
        return torch.where((nth >= 0)[..., None], virtual.to(output.dtype)[nth.clamp(min=0)], output)

    def end(self, body: nn.Module, args: Any, output: Any) -> None:
        """After the body has run: whatever else embeds words gets them as they are."""
        self.now = None
        self._mark(cache_made(output))

    def _mark(self, cache: Any) -> None:
        if cache is not None:
            vars(cache)[f"_pefttutor_{self.note}"] = True
