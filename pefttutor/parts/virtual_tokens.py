"""Virtual tokens: trained vectors that a model reads before a text, as if they were its first words.

    [P; E(x)]          P (P, d) trained, E(x) (n, d) the text's own embeddings

They go into the model's body: a mask, positions and a cache grow by them, and what the body says of them is cut off
again. So a loss, a head and `generate` see the text alone, at its own places.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pefttutor.data.trial import ordinary, trial
from pefttutor.parts.blocks import blocks
from pefttutor.parts.called import own_tokens
from pefttutor.parts.network import Itself, Made, Maker, Network
from pefttutor.parts.streams import (
    MADE_FOR_A_CACHE,
    Hooked,
    cache_made,
    hooked_by,
    named_arguments,
    reader,
    seen_before,
    token_table,
)
from pefttutor.parts.weaving import cut_to, woven

__all__ = ["VirtualTokens", "inserted", "put_before", "reading_body"]

EXTENDED = ("attention_mask", "position_ids", "token_type_ids")  # what has a value for each token


class VirtualTokens(Made):
    """What makes the virtual tokens, kept in the model's body. `count`: how many tokens longer a text becomes."""

    def __init__(
        self, tensors: Iterable[tuple[nn.Module, str, str, Tensor]], maker: Maker, count: int
    ) -> None:
        super().__init__(tensors, maker)
        self.count = count

    def lengthens(self) -> int:
        return self.count if self.on else 0

    def covers(self, module: nn.Module) -> bool:
        return self.on and any(module is body for body, _ in self.places.values())


def put_before(
    model: Any, count: int, make: Itself | Network, tensors: Mapping[str, Tensor], *, note: str, what: str
) -> list[Any]:
    """The parts that let `model` read so many virtual tokens before each text.

    make: makes the virtual tokens of `tensors`, which the body holds by their keys. note: what a cache that holds
    them is marked with, which no other attachment uses. what: how the refusal of a model without tokens begins.

    Shapes: make → (count, d), d the width of the token embeddings.
    Raises: ValueError as `reading_body`, for more tokens than the model has positions, and where a trial shows that the
        model's blocks don't get them.
    """
    body, path = reading_body(model, what)
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest <= count:
        raise ValueError(
            f"num_virtual_tokens is {count}, and this model has positions for {longest} tokens at most, the text's own "
            "among them."
        )
    table = body.get_input_embeddings()
    maker = Maker(make)
    stream = _Stream(count, maker, note, ordinary(model, len(table.weight), 1)[0], cuts=not _reads_two(model))
    before: list[Any] = [(body, stream.insert)]
    if _reads_two(model):
        before.append((model.get_decoder(), stream.let_see))
        end = body
    else:
        # A pooler between blocks and body reads the text's first token, not the first virtual one.
        inside = blocks(model)[0].removeprefix(path).lstrip(".").split(".")
        end = body.get_submodule(inside[0]) if len(inside) > 1 else body
    added = VirtualTokens([(body, path, key, tensor) for key, tensor in tensors.items()], maker, count)
    parts = [added, Hooked(before, after=[(table, stream.embed), (end, stream.cut)])]
    tokens = own_tokens(model)
    if tokens is not None:
        with trial(model):
            model(**tokens)
    return parts


def reading_body(model: Any, what: str) -> tuple[Any, str]:
    """The module that reads the token ids of a text, an encoder-decoder's encoder, and its name in the model.

    Raises: ValueError for a model that reads no tokens; `what` is how it begins.
    """
    token_table(model, what)
    body = model.get_encoder() if _reads_two(model) else reader(model)[0]
    return body, next(name for name, module in model.named_modules() if module is body)


def _reads_two(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def inserted(body: nn.Module, ids: Tensor) -> Tensor:
    """Which of the ids that `body` is called with stand for virtual tokens before a text: (batch, seq) as they are."""
    found, at = torch.zeros_like(ids, dtype=torch.bool), torch.arange(ids.shape[1], device=ids.device)
    for stream in hooked_by(body):
        if isinstance(stream, _Stream) and stream.now is not None:
            after = stream.now[2][:, None]
            found |= (at >= after) & (at < after + stream.count)
    return found


@dataclass(eq=False)
class _Stream:
    """What happens to each call of the body. It holds no module, so that a copied model is free of the original.

    Virtual tokens get an ordinary word's id, so that all that a model finds out from ids stays right; the embedding of
    that word is then replaced.

    note: what a cache that holds them is marked with. now: the virtual tokens of this call, how many tokens it has
    besides, and after how many of each text they stand; None in a call that goes on from a cache.
    """

    count: int
    make: Maker
    note: str
    word: int
    cuts: bool
    now: tuple[Tensor, int, Tensor] | None = field(default=None, repr=False)
    embedded: bool = False
    rank: ClassVar[int] = 0  # see `Hooked`: whatever else looks at a text's tokens sees the virtual ones, too

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"now": None}  # a copy is in no call

    def insert(self, body: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the body runs: virtual tokens come before the first token of each text, after padding on the left."""
        named = named_arguments(body, args, kwargs)
        x = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
        batch, n = x.shape[:2]
        _check_known(named, batch, n)
        mask, positions = named.get("attention_mask"), named.get("position_ids")
        streams = [s for s in hooked_by(body) if isinstance(s, _Stream)]
        ahead = sum(stream.count for stream in streams[: streams.index(self)])
        if mask is None:
            after = torch.full((batch,), ahead, device=x.device)
        else:
            after = mask.bool().long().argmax(1) + ahead
            named["attention_mask"] = woven(mask, mask.new_ones(batch, self.count), after)
        self.now, self.embedded = None, False
        if self._goes_on(named, n, mask, sum(stream.count for stream in streams) - ahead):
            if positions is not None:
                named["position_ids"] = positions + self.count
            return (), named
        if mask is not None and mask.shape[1] != n:
            raise ValueError(
                f"attention_mask is {tuple(mask.shape)}, expected ({batch}, {n}): one for each token."
            )
        virtual = self.make(body)
        self.now = virtual, n, after
        if x.is_floating_point():
            named["inputs_embeds"] = woven(x, virtual.to(x.dtype).expand(batch, -1, -1), after)
            self.embedded = True
        else:
            named["input_ids"] = woven(x, x.new_full((batch, self.count), self.word), after)
        if positions is not None:
            positions = positions.expand(batch, -1)
            own = positions.gather(1, after[:, None]) + torch.arange(self.count, device=x.device)
            later = torch.arange(n, device=x.device) >= after[:, None]
            named["position_ids"] = woven(positions + self.count * later, own, after)
        if named.get("token_type_ids") is not None:
            kinds = named["token_type_ids"]
            named["token_type_ids"] = woven(kinds, kinds.new_zeros(batch, self.count), after)
        return (), named

    def _goes_on(self, named: dict[str, Any], n: int, mask: Tensor | None, to_come: int) -> bool:
        """Whether this call goes on from a cache that holds the virtual tokens; one that it fills is marked."""
        cache, filled = seen_before(named)
        if cache is None:
            return False
        marked = vars(cache).get(f"_pefttutor_{self.note}", False)
        vars(cache)[f"_pefttutor_{self.note}"] = True
        if not filled:
            return marked and filled is None
        if not marked:
            raise ValueError(
                "this cache was filled without the virtual tokens, which stand before a text: compute its beginning "
                "with the adapted model too."
            )
        # How long it takes the text to be: without a mask it is only seen where its first token here stands.
        positions, known, held = named.get("position_ids"), None, int(cache.get_seq_length())
        if mask is not None:
            known, said = mask.shape[1], f"the mask is {tuple(mask.shape)}"
        elif positions is not None:
            known, said = int(positions[0, 0]) + n, f"position_ids begin at {int(positions[0, 0])}"
        if known is not None and known + to_come != held + n:
            raise ValueError(
                f"the cache holds {held} tokens, virtual ones among them, {n} more came, and {said}: don't take a "
                "text's length from the cache, as a second generate with it does; give that the text without a cache."
            )
        return True

    def embed(self, table: nn.Module, args: Any, output: Tensor) -> Tensor:
        """After the words are embedded: the virtual tokens take the places that are theirs."""
        if self.now is None or self.embedded:
            return output
        self.embedded = True
        virtual, _, after = self.now
        places = after[:, None] + torch.arange(self.count, device=after.device)
        index = places[..., None].expand(-1, -1, output.shape[2])
        return output.scatter(1, index, virtual.to(output.dtype).expand(len(after), -1, -1))

    def cut(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After the blocks have run: only the text's own tokens are left, but for a decoder that looks at all."""
        cache = cache_made(output)
        if cache is not None:
            vars(cache)[f"_pefttutor_{self.note}"] = True
        if self.now is None:
            return output
        _, n, after = self.now
        self.now = None
        first = output if isinstance(output, Tensor) else output[0]
        if not self.embedded or tuple(first.shape[:2]) != (len(after), n + self.count):
            raise ValueError(
                f"virtual tokens: a {type(module).__name__} gives {tuple(first.shape)} for {n} tokens and {self.count} "
                "virtual ones before them, so they don't go through it as words do."
            )
        if not self.cuts:
            return output
        places = torch.arange(n, device=after.device).expand(len(after), n)
        return cut_to(output, places + self.count * (places >= after[:, None]), self.count)

    def let_see(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before a decoder runs: it sees the virtual tokens among what the encoder says."""
        named = named_arguments(decoder, args, kwargs)
        mask, states = named.get("encoder_attention_mask"), named.get("encoder_hidden_states")
        if mask is not None and states is not None and states.shape[1] > mask.shape[1]:
            padding = mask.bool().long().argmax(1)
            named["encoder_attention_mask"] = woven(mask, mask.new_ones(len(mask), self.count), padding)
        return (), named


def _check_known(named: dict[str, Any], batch: int, n: int) -> None:
    """Raise ValueError where it isn't known what virtual tokens have of an argument."""
    for key, value in named.items():
        shape = getattr(value, "shape", None)
        known = value is None or key not in EXTENDED or (isinstance(value, Tensor) and value.dim() == 2)
        other = key not in (*EXTENDED, "input_ids") and shape == (batch, n) and not value.is_floating_point()
        if other or not known:
            raise ValueError(
                f"virtual tokens: it isn't known what they have of {key}, {type(value).__name__} {tuple(shape or ())}; "
                f"expected {', '.join(EXTENDED)} with a value for each token, and nothing else of the kind. "
                + (MADE_FOR_A_CACHE if key == "attention_mask" else "")
            )
