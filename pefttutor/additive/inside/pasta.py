"""PASTA: add a trained vector to the hidden states of the special tokens, before each block.

h_{l, p(i)} ← h_{l, p(i)} + v_{l, i}          p(i): the place of the i-th special token of a text
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.added import Added
from pefttutor.parts.attachment import added_key
from pefttutor.parts.blocks import blocks
from pefttutor.parts.freezing import train_fully
from pefttutor.parts.settings import check_names, check_whole
from pefttutor.parts.streams import Hooked, body, hidden_size, hidden_states, seen_before

__all__ = ["PASTA"]

KEY = "special"


@dataclass(frozen=True, kw_only=True)
class PASTA:
    """Train one vector a block for each of a text's special tokens, such as [CLS] and [SEP].

    special_token_ids: which tokens are special.
    num_special: how many of them in a text have a vector: 2 for one sentence, 3 for a pair.
    modules_to_save: modules that train fully and are saved along, such as a new head ("classifier").

    The vectors start at 0, so the model starts as it was. The survey counts PASTA among selective methods; its
    authors count it as an addition, which it is.

    Cost: trains L · d · num_special values (`count`).
    Raises: ValueError without special tokens, or for a model without a list of blocks or one that doesn't read one
        text, as an encoder-decoder or a ViT.
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
            table, (path, stack), key = _token_table(model), blocks(model), added_key(KEY, name)
            zeros = table.new_zeros(self.num_special, hidden_size(model))
            zeros = zeros.to(torch.promote_types(zeros.dtype, torch.float32))
            new.add(
                _Vectors(
                    (block, f"{path}.{i}", key, nn.Parameter(zeros.clone())) for i, block in enumerate(stack)
                )
            )
            noted = _Numbers(tuple(self.special_token_ids), key)
            hooks: list[Any] = [(body(model), noted.note), *((block, noted.add) for block in stack)]
            new.add(Hooked(hooks, after=[(body(model), noted.remember)]))
            for part in train_fully(model, (), self.modules_to_save):
                new.add(part)
        return model

    def count(self, model: nn.Module) -> int:
        """L · d · num_special, without `modules_to_save`."""
        _token_table(model)
        return len(blocks(model)[1]) * hidden_size(model) * self.num_special


def _token_table(model: nn.Module) -> Tensor:
    """The token embeddings of a model that reads one text. Shapes: → (vocabulary, d)."""
    get = getattr(model, "get_input_embeddings", None)
    table = get() if callable(get) else None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"PASTA reads one text, and a {type(model).__name__} has two; take an encoder or a decoder alone."
        )
    if not isinstance(table, nn.Embedding):
        raise ValueError(
            f"PASTA adds to special tokens, and a {type(model).__name__} has none: its input goes into a "
            f"{type(table).__name__}, not into token embeddings."
        )
    return table.weight


class _Vectors(Added):
    """One vector for each special token, in every block."""

    def covers(self, module: nn.Module) -> bool:
        return self.on and any(module is block for block, _ in self.places.values())

    def trace(self, layer: nn.Module, x: Any, tape: Any, kind: str) -> Any:
        """Kept is which vector goes to which token; the block's input requires a gradient from here on."""
        if not self.covers(layer):
            return None
        tape.save(x.like(width=1, itemsize=8, grad=False), kind)
        return x.like(grad=True)


@dataclass(eq=False)
class _Numbers:
    """Which special token of its text each token of this call is: i + 1 for the i-th, 0 for an ordinary one.

    In a call that goes on from a cache, the tokens before it count too: how many they were is noted on the cache.
    """

    special_token_ids: tuple[int, ...]
    key: str
    number: Tensor | None = None  # (batch, seq)
    before: Tensor | None = field(
        default=None, repr=False
    )  # (batch): how many there have been after this call

    def note(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the body: find the special tokens of this batch; padding is none."""
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else next(iter(args), None)
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            raise ValueError("PASTA finds the special tokens in input_ids; give these, not inputs_embeds.")
        special = torch.isin(ids, torch.tensor(self.special_token_ids, device=ids.device))
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
        cache, length = seen_before(kwargs)
        if length == 0:
            return torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        noted = vars(cache).get(f"_pefttutor_{self.key}")
        if noted is None or len(ids) % len(noted):
            raise ValueError(
                "PASTA counts a text's special tokens from its start, and this cache was filled without it: compute "
                "the text's beginning with the adapted model too."
            )
        return noted.repeat_interleave(len(ids) // len(noted))  # beams of one text share its beginning

    def remember(self, model: nn.Module, args: Any, output: Any) -> None:
        """After the body: a cache that was made in this call knows what it holds."""
        cache = getattr(output, "past_key_values", None)
        if hasattr(cache, "get_seq_length"):
            vars(cache)[f"_pefttutor_{self.key}"] = self.before

    def add(self, block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Before a block: add the vectors to the hidden states of the special tokens."""
        vectors = block.get_parameter(self.key)
        assert self.number is not None
        table = torch.cat([torch.zeros_like(vectors[:1]), vectors])  # row 0: nothing is added
        added: Tensor = table[self.number * (self.number <= len(vectors))]  # (batch, seq, d)
        hidden = hidden_states(args, kwargs)
        return hidden_states(args, kwargs, hidden + added.to(hidden.dtype))
