"""PASTA: add a trained vector to the hidden states of the special tokens, before each block.

h_{l, p(i)} ← h_{l, p(i)} + v_{l, i}          p(i): the place of the i-th special token of a text
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor import method as base
from pefttutor.parts import entries
from pefttutor.selective.layers import blocks

__all__ = ["PASTA"]


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
        if not isinstance(self.num_special, int) or self.num_special < 1:
            raise ValueError(f"num_special is {self.num_special!r}; it must be a whole number ≥ 1.")
        ids = self.special_token_ids
        if not isinstance(ids, Collection) or not all(isinstance(i, int) for i in ids):
            raise ValueError(f"special_token_ids is {ids!r}; expected whole numbers, such as (101, 102).")

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze `model`, add the vectors, and return it. Raises: RuntimeError if it is adapted already."""
        base.refuse_adapted(model)
        if not self.special_token_ids:
            raise ValueError(
                "special_token_ids is empty; expected such as (tokenizer.cls_token_id, tokenizer.sep_token_id)."
            )
        _, stack = blocks(model)
        table = _token_table(model)
        whole = set(entries.candidates(model)) - set(entries.candidates(model, self.modules_to_save))
        base.freeze(model)
        for name, p in model.named_parameters():
            p.requires_grad_(name in whole)
        for block in stack:
            block.register_parameter(
                "special", nn.Parameter(table.new_zeros(self.num_special, table.shape[1]))
            )
            block.register_forward_pre_hook(_add, with_kwargs=True)
        vars(model)["_special_ids"] = tuple(self.special_token_ids)
        model.register_forward_pre_hook(_note, with_kwargs=True)
        return base.mark(model, self)

    def count(self, model: nn.Module) -> int:
        """L · d · num_special, without `modules_to_save`."""
        return len(blocks(model)[1]) * _token_table(model).shape[1] * self.num_special

    def trace(self, layer: nn.Module, x: Any, tape: Any, kind: str) -> Any:
        """What a block gets in the place of x, for `pefttutor.memory`; None for any other layer.

        It keeps which vector goes to which token, and requires a gradient from here on.
        """
        if "special" not in layer._parameters:
            return None
        tape.save(x.like(width=1, itemsize=8, grad=False), kind)
        return x.like(grad=True)


def _token_table(model: nn.Module) -> Tensor:
    """The token embeddings of a model that reads one text. Shapes: → (vocabulary, d)."""
    table = model.get_input_embeddings()  # type: ignore[operator]
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


def _note(model: nn.Module, args: Any, kwargs: Any) -> None:
    """Where the special tokens of this batch are: number i + 1 at the i-th of a text, 0 elsewhere."""
    ids = kwargs["input_ids"] if "input_ids" in kwargs else next(iter(args), None)
    if ids is None:
        raise ValueError("PASTA finds the special tokens in input_ids; give these, not inputs_embeds.")
    special = torch.isin(ids, torch.tensor(vars(model)["_special_ids"], device=ids.device))
    number = special.cumsum(1) * special  # (batch, seq)
    for block in blocks(model)[1]:
        vars(block)["_special_number"] = number


def _add(block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    vectors, number = block.get_parameter("special"), vars(block)["_special_number"]
    table = torch.cat([torch.zeros_like(vectors[:1]), vectors])  # row 0: nothing is added
    added: Tensor = table[number * (number <= len(vectors))]  # (batch, seq, d)
    if args:
        return (args[0] + added.to(args[0].dtype), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": kwargs["hidden_states"] + added.to(kwargs["hidden_states"].dtype)}
