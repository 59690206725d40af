"""PASTA: add a trained vector to the hidden states of the special tokens, before each block.

h_{l, p(i)} ← h_{l, p(i)} + v_{l, i}          p(i): the place of the i-th special token of a text
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.added import Added
from pefttutor.parts.attachment import added_key
from pefttutor.parts.blocks import blocks
from pefttutor.parts.freezing import train_fully
from pefttutor.parts.settings import check_names, check_whole
from pefttutor.parts.streams import (
    Hooked,
    cache_made,
    hidden_states,
    reader,
    seen_before,
    token_ids,
    token_table,
)
from pefttutor.parts.virtual_tokens import inserted

__all__ = ["PASTA"]

KEY = "special"


@dataclass(frozen=True, kw_only=True)
class PASTA:
    """Train one vector a block for each of a text's special tokens, such as [CLS] and [SEP].

    >>> model = nn.ModuleDict({"tokens": nn.Embedding(9, 4), "blocks": nn.ModuleList([nn.Linear(4, 4)] * 3)})
    >>> model.get_input_embeddings = lambda: model["tokens"]
    >>> model.forward = lambda input_ids: model["blocks"][0](model["tokens"](input_ids))
    >>> PASTA(special_token_ids=(7, 8)).count(model)                # 3 blocks · d = 4 · 2 special tokens
    24

    special_token_ids: which tokens are special.
    num_special: how many of them in a text have a vector: 2 for one sentence, 3 for a pair.
    modules_to_save: modules that train fully and are saved along, such as a new head ("classifier").

    The vectors start at 0, so the model starts as it was. They are counted from the start of a text, so a cache of
    keys and values must have been filled with the adapted model. The survey counts PASTA among selective methods; its
    authors count it as an addition, which it is.

    Shapes: v (num_special, d) in each of L blocks.
    Cost: it trains L · d · num_special values (`count`).
    Raises: ValueError without special tokens, for a model without a list of blocks, or for one that doesn't read one
        text, such as an encoder-decoder or a ViT.
    Source: Yang et al. 2022, arXiv:2211.08682 (Findings of EACL 2023), eq. 1 and 2.
    """

    special_token_ids: Collection[int] = ()
    num_special: int = 2
    modules_to_save: Collection[str] = ()

    def __post_init__(self) -> None:
        check_whole(self, "num_special")
        check_names(self, "modules_to_save")
        ids = self.special_token_ids
        if not isinstance(ids, Collection) or not all(isinstance(i, int) for i in ids):
            raise ValueError(f"special_token_ids is {ids!r}; it must be whole numbers, such as (101, 102).")
        object.__setattr__(self, "special_token_ids", tuple(ids))

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, add the vectors, and return it. Raises: ValueError if the name is in use."""
        if not self.special_token_ids:
            raise ValueError(
                "special_token_ids is empty; expected such as (tokenizer.cls_token_id, tokenizer.sep_token_id)."
            )
        with attaching(model, self, name) as new:
            table, key = _token_table(model), added_key(KEY, name)
            path, layers = blocks(model)
            body, width = reader(model)
            zeros = table.new_zeros(self.num_special, width)
            zeros = zeros.to(torch.promote_types(zeros.dtype, torch.float32))
            vectors = [nn.Parameter(zeros.clone()) for _ in layers]
            new.add(_Vectors((layers[i], f"{path}.{i}", key, vector) for i, vector in enumerate(vectors)))
            numbers = _Numbers(tuple(self.special_token_ids), key)
            hooks: list[Any] = [(body, numbers.note), *((layer, numbers.add) for layer in layers)]
            new.add(Hooked(hooks, after=[(body, numbers.remember)]))
            for part in train_fully(model, (), self.modules_to_save):
                new.add(part)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values the vectors hold, L · d · num_special, without `modules_to_save`."""
        _token_table(model)
        return len(blocks(model)[1]) * reader(model)[1] * self.num_special


def _token_table(model: nn.Module) -> Tensor:
    """The token embeddings of a model that reads one text. Shapes: → (vocabulary, d).

    Raises: ValueError for a model that reads two texts, or none.
    """
    table = token_table(model, "PASTA adds to special")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        kind = type(model).__name__
        raise ValueError(f"PASTA reads one text, and a {kind} has two; take an encoder or a decoder alone.")
    return table


class _Vectors(Added):
    """One vector for each special token, in every block."""

    def covers(self, module: nn.Module) -> bool:
        return self.on and any(module is block for block, _ in self.places.values())

    def trace(self, layer: nn.Module, x: Any, tape: Any, kind: str) -> Any:
        """The tape keeps which vector goes to which token; the block's input requires a gradient from here on."""
        if not self.covers(layer):
            return None
        if learns := tape.trains(*self.trained()):
            tape.save(x.like(width=1, itemsize=8, grad=False), kind)
        return x.like(grad=x.grad or learns)


@dataclass(eq=False)
class _Numbers:
    """Which special token of its text each token of this call is: i + 1 for the i-th, 0 for an ordinary one.

    In a call that goes on from a cache, the tokens before it count too: how many they were is noted on the cache.
    """

    special_token_ids: tuple[int, ...]
    key: str
    number: Tensor | None = None  # (batch, seq)
    # How many special tokens each text has had after this call.
    before: Tensor | None = field(default=None, repr=False)  # (batch)
    rank: ClassVar[int] = 1  # see `Hooked`: after virtual tokens, which its blocks get too

    def note(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the body runs: find the special tokens of this batch. Padding is no special token."""
        ids = token_ids(args, kwargs)
        if ids is None:
            raise ValueError("PASTA finds the special tokens in input_ids; give these, not inputs_embeds.")
        special = torch.isin(ids, torch.tensor(self.special_token_ids, device=ids.device))
        special &= ~inserted(model, ids)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            special &= mask[:, -ids.shape[1] :].bool()
        self.number = (special.cumsum(1) + self._earlier(ids, kwargs).unsqueeze(1)) * special
        self.before = self._earlier(ids, kwargs) + special.sum(1)
        cache, _ = seen_before(kwargs)
        if cache is not None:
            vars(cache)[f"_pefttutor_{self.key}"] = self.before

    def _earlier(self, ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """How many special tokens each text had before this call. Shapes: → (batch)."""
        cache, filled = seen_before(kwargs)
        counts = vars(cache).get(f"_pefttutor_{self.key}") if filled is not False else None
        if counts is None and not filled:
            return torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        if counts is None or len(ids) % len(counts):
            raise ValueError(
                "PASTA counts a text's special tokens from its start, and this cache was filled without it: compute "
                "the text's beginning with the adapted model too."
            )
        return counts.repeat_interleave(len(ids) // len(counts))  # beams of one text share its beginning

    def remember(self, model: nn.Module, args: Any, output: Any) -> None:
        """After the body has run: write onto a cache that was made in this call what it holds."""
        cache = cache_made(output)
        if cache is not None:
            vars(cache)[f"_pefttutor_{self.key}"] = self.before

    def add(self, block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Before a block runs: add the vectors to the hidden states of the special tokens."""
        vectors = block.get_parameter(self.key)
        hidden = hidden_states(args, kwargs)
        if self.number is None or self.number.shape != hidden.shape[:2]:
            raise ValueError(
                f"PASTA's block got hidden states {tuple(hidden.shape)} and doesn't know their tokens: call the model, "
                "or what turns its tokens into hidden states, not a block alone."
            )
        table = torch.cat([torch.zeros_like(vectors[:1]), vectors])  # row 0: nothing is added
        number = self.number.to(table.device)  # the block's, which may be another one than the tokens'
        added: Tensor = table[number * (number <= len(vectors))]  # (batch, seq, d)
        return hidden_states(args, kwargs, hidden.to(added.device) + added.to(hidden.dtype))
