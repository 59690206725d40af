"""A prefix in a model: what happens to each call of its body, and to each of its attentions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pefttutor.parts.cached_attention import Form, cache_key
from pefttutor.parts.network import Made, Maker
from pefttutor.parts.prefix_cache import empty, real_one, with_prefix
from pefttutor.parts.streams import CACHES, MADE_FOR_A_CACHE, Hooked, named_arguments, seen_before

__all__ = ["Prefix", "prefixed"]

Gate = Callable[[], Tensor]  # → (batch)


class Prefix(Made):
    """What makes the prefix, kept in the model's body. `count`: how many keys and values it has in every layer."""

    def __init__(
        self, tensors: Iterable[tuple[nn.Module, str, str, Tensor]], maker: Maker, count: int
    ) -> None:
        super().__init__(tensors, maker)
        self.count = count

    def precedes(self) -> int:
        return self.count if self.on else 0


def prefixed(
    model: Any,
    form: Form,
    count: int,
    maker: Maker,
    tensors: Mapping[str, Tensor],
    note: str,
    gates: Mapping[int, Gate] | None = None,
) -> list[Any]:
    """The parts that put so many keys and values before those of each text.

    maker: makes (count, form.width) of `tensors`: for each layer in turn a key and a value, head by head.
    note: what a cache that was filled with them is marked with, which no other attachment uses.
    gates: by a layer's index what its keys and values are multiplied with, for each text.
    """
    stream = _Stream(count, maker, note, form.layers, form.shape, {} if gates is None else gates)
    added = Prefix([(form.body, form.path, key, tensor) for key, tensor in tensors.items()], maker, count)
    before = [(form.body, stream.enter), *((module, stream.attend) for module in form.attention)]
    return [added, Hooked(before, after=[(form.body, stream.leave)])]


@dataclass(eq=False)
class _Stream:
    """What happens to each call.

    body: while it runs and until its backward pass, in which a checkpointed layer is run again. real: the cache that
    goes in and out, where the model gets one that shows the prefix.
    """

    count: int
    maker: Maker
    note: str
    layers: tuple[int, ...]
    shape: tuple[int, int]
    gates: Mapping[int, Gate]
    body: Any = field(default=None, repr=False)
    real: Any = field(default=None, repr=False)
    made: Tensor | None = field(default=None, repr=False)
    rank: ClassVar[int] = 2  # see `Hooked`: whatever writes onto the call's cache gets that one

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"body": None, "real": None, "made": None}  # a copy is in no call

    def enter(self, body: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the body runs: its cache shows the prefix, its mask and its positions count it."""
        named, key = named_arguments(body, args, kwargs), cache_key(body) or ""
        cache, _ = seen_before(named)
        config = body.config
        decodes = getattr(config, "is_decoder", True)
        if cache is None:
            cache, uses = empty(config), named.get("use_cache")
            uses = getattr(config, "use_cache", False) if uses is None else uses
            self.real = cache if uses and decodes else None
        else:
            self._check_own(cache)
            self.real = cache
        self.body, self.made = body, None
        named[key] = with_prefix(
            cache, list(self.layers), self.count, self._extend, stores=self.real is not None
        )
        mask, positions = named.get("attention_mask"), named.get("position_ids")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                raise ValueError(
                    f"a prefix lengthens attention_mask, which is {type(mask).__name__} "
                    f"{tuple(getattr(mask, 'shape', ()))}; expected a value for each token, (batch, seq). "
                    + MADE_FOR_A_CACHE
                )
            named["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.count), mask], 1)
            if positions is None and decodes and "position_ids" in inspect.signature(body.forward).parameters:
                positions = _after_padding(named, mask)
        if positions is not None:
            named["position_ids"] = positions + self.count
        return (), named

    def _check_own(self, cache: Any) -> None:
        """Raise ValueError for a cache that holds a text without the prefix; one that is empty is marked."""
        real = real_one(cache)
        _, filled = seen_before({CACHES[0]: real})
        if filled and not vars(real).get(f"_pefttutor_{self.note}", False):
            raise ValueError(
                "this cache was filled without the prefix: compute the text's beginning with the adapted model too."
            )
        vars(real)[f"_pefttutor_{self.note}"] = True

    def _extend(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The prefix of a layer before its keys and values; it is made once a call."""
        if self.made is None:
            self.made = self.maker(self.body)
        return self._before(self.made, index, keys, values)

    def _before(self, made: Tensor, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        each = made.view(self.count, len(self.layers), 2, *self.shape)[:, self.layers.index(index)]
        rows = each.permute(1, 2, 0, 3).to(keys).unsqueeze(1).expand(-1, len(keys), -1, -1, -1)
        if index in self.gates:
            rows = rows * self.gates[index]().to(keys).view(-1, 1, 1, 1)
        return torch.cat([rows[0], keys], 2), torch.cat([rows[1], values], 2)

    def attend(
        self, attention: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Before an attention runs: a checkpointed layer has taken its cache away, and gets the prefix all the same.

        It is made anew there, from what trains, since in a reentrant backward pass each layer is a graph of its own.
        """
        named, key = named_arguments(attention, args, kwargs), cache_key(attention) or ""
        cache = named.get(key)
        if cache is not None and not vars(cache).get("_pefttutor_alone", False):
            return None

        def extend(index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            return self._before(self.maker(self.body), index, keys, values)

        other = cache is not None  # that of another prefix, which goes before this text's keys, too
        if cache is None:
            cache = empty(self.body.config)
            cache = getattr(cache, "self_attention_cache", cache)
            vars(cache)["_pefttutor_alone"] = True
        named[key] = with_prefix(cache, list(self.layers), self.count, extend, stores=other)
        return (), named

    def leave(self, body: Any, args: Any, output: Any) -> Any:
        """After the body has run: what goes out is the cache that holds the text alone."""
        self.made = None
        if self.real is not None:
            vars(real_one(self.real))[f"_pefttutor_{self.note}"] = True
        real, self.real = self.real, None
        for key in CACHES if isinstance(output, dict) else ():
            if key in output.keys():  # noqa: SIM118 (`in` knows old names too)
                output[key] = real
        if isinstance(output, tuple):
            return tuple(real if hasattr(x, "get_seq_length") else x for x in output)
        return output


def _after_padding(named: dict[str, Any], mask: Tensor) -> Tensor | None:
    """The positions of texts that are padded on the left: there the prefix stands right before the text, too.

    None without such padding, where a model numbers its tokens itself.
    """
    if bool(mask[:, 0].all()):
        return None
    x = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
    return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -x.shape[1] :]
