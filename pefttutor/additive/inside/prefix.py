"""Prefix tuning: train keys and values that stand before those of every text, in every layer.

K ← [P_K; K]      V ← [P_V; V]
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.cached_attention import Form, recorded
from pefttutor.parts.freezing import fully_trained, train_fully
from pefttutor.parts.network import settle
from pefttutor.parts.prefix_settings import KEY, add_prefix, check_prefix, count_prefix
from pefttutor.parts.settings import check_names, shown
from pefttutor.parts.streams import longer_by, token_table

__all__ = ["PrefixTuning"]

BEFORE = "PrefixTuning stands before a text's"


@dataclass(frozen=True, kw_only=True)
class PrefixTuning:
    """Train the keys and values of `num_virtual_tokens` words that were never read, in every layer.

    softmax(q [P_K; K]ᵀ / √d_h) [P_V; V] = (1 − λ) softmax(q Kᵀ / √d_h) V + λ softmax(q P_Kᵀ / √d_h) P_V

    with λ the share of attention that the prefix gets.

    >>> from pefttutor.models import load
    >>> method = PrefixTuning(num_virtual_tokens=4, prefix_projection=True)
    >>> model = method.attach(load("campus-nano")[0])
    >>> model = method.drop_projection(model)                                  # trained: the MLP isn't needed any more
    >>> model.model.prefix.numel() == PrefixTuning(num_virtual_tokens=4).count(model)
    True

    num_virtual_tokens: how many, P.
    prefix_projection: whether an MLP makes the prefix of a smaller table, which trains more smoothly (Li & Liang):
        W₂ tanh(W₁ t + b₁) + b₂. Without it, the prefix itself trains: that is P-tuning v2.
    encoder_hidden_size: the MLP's width m; None is d. The authors have 512 for tables to text, 800 for summaries.
    modules_to_save: modules that train fully and are saved along, such as a new head ("score", "classifier").
    init_seed: fixes what is drawn, whatever the device.

    No prefix is the identity, not one of zeros: its keys take their share λ of the attention all the same. The texts'
    positions start after it, and keys are not rotated that stand in it. A cache holds the text alone, as without a
    prefix. Of an encoder-decoder, the decoder's own attention gets it. Where attention reaches back so many words only,
    it doesn't reach the prefix from later ones.

    Shapes: table (P, d); prefix (P, 2 · L · n · d_h), L layers with n heads of keys and values.
    Cost: it trains P · 2 L n d_h values; with an MLP P d + (d m + m) + (m + 1) · 2 L n d_h until that is dropped
        (`count`). Attention has P keys more in every layer.
    Raises: ValueError for a model that reads no tokens, or whose attention takes no cache; in a call, for a cache that
        was filled without the prefix, or a mask that isn't one value a token.
    Source: Li & Liang 2021, arXiv:2101.00190, section 4; Liu et al. 2021, arXiv:2110.07602 (P-tuning v2); the identity:
        He et al. 2021, arXiv:2110.04366, eq. 7.
    """

    num_virtual_tokens: int = 20
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_prefix(self)
        check_names(self, "modules_to_save")

    def attach(self, model: nn.Module, start: Any = None, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, put the prefix before each text's keys and values, and return it.

        start: `num_virtual_tokens` token ids, or as many embeddings (P, d), such as a soft prompt that was learned; the
            prefix then starts as the keys and values that the frozen model computes of them. One that reads from left
            to right says what it says after these words, without reading them in each call. An encoder-decoder's
            decoder computes them while the encoder reads the same words, and another text later: there it is a start
            and no more. Without, it is drawn.

        Raises: ValueError if the name is in use, the start doesn't fit, or the model can't take a prefix. The model is
            then as it was.
        """
        with attaching(model, self, name) as new:
            begins = partial(self._computed, model, start=start)
            add_prefix(new, model, BEFORE, begins)
            for part in train_fully(model, (), self.modules_to_save):
                new.add(part)
        return model

    def drop_projection(self, model: nn.Module, *, name: str | None = None) -> nn.Module:
        """After training: keep what the MLP makes in its place. The model says what it said.

        name: the attachment's, where there are several. Raises: ValueError if it has no MLP.
        """
        return settle(model, name, KEY, lambda method: replace(method, prefix_projection=False))

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: the prefix, or table and MLP, and modules_to_save."""
        fully, _ = fully_trained(model, self.modules_to_save)
        own = count_prefix(model, self, BEFORE)
        return own + sum(model.get_parameter(name).numel() for name in fully)

    def _computed(self, model: nn.Module, form: Form, start: Any) -> nn.Parameter | None:
        """The keys and values that the frozen model computes of words; None without any."""
        if start is None:
            return None
        table, rows = token_table(model, BEFORE), self.num_virtual_tokens
        words = _words(start, len(table))
        kind, shape = "input_ids", torch.Size([rows])
        if words is not None and words.is_floating_point():
            kind, shape = "inputs_embeds", torch.Size([rows, table.shape[1]])
            words = words.detach().to(table)
        if words is None or words.shape != shape or self.prefix_projection:
            raise ValueError(
                f"start is {shown(start)}; expected {rows} token ids, as many as num_virtual_tokens, or their "
                f"embeddings, {(rows, table.shape[1])}, and no prefix_projection: an MLP can't be told what to make. "
                f"Ids are below {len(table)}."
            )
        if more := longer_by(model):
            raise ValueError(
                f"this model reads {more} virtual tokens before each text, so it can't say what it computes of a start "
                "alone: take them out, or switch them off, before attaching."
            )
        inputs = {kind: words[None].to(table.device)}
        if model.config.is_encoder_decoder:  # type: ignore[union-attr]
            inputs[f"decoder_{kind}"] = inputs[kind]
        states = [x for _, *both in recorded(model, form.body, inputs).values() for x in both]
        made = torch.stack([x[0] for x in states]).permute(2, 0, 1, 3).flatten(1)  # (P, 2 L, heads, head_dim)
        return nn.Parameter(made.to(torch.promote_types(made.dtype, torch.float32)))


def _words(start: Any, vocabulary: int) -> Tensor | None:
    """Token ids, all in the vocabulary, or numbers that may be embeddings; None for anything else."""
    try:
        words = torch.as_tensor(start)
    except (TypeError, ValueError, RuntimeError):
        return None
    if words.is_floating_point():
        return words
    whole = words.dtype != torch.bool and not words.is_complex() and words.numel()
    return words.long() if whole and 0 <= int(words.min()) <= int(words.max()) < vocabulary else None
