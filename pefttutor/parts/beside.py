"""Models that run beside another one on the same tokens, each with a cache of its own.

The cache of the model that is being used carries theirs along, so that beams are reordered, and drafts cut off, in all.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.data.trial import evaluating
from pefttutor.parts.streams import CACHES, cache_made

__all__ = ["caches_beside", "carry", "check_call", "places", "run_beside", "vocabulary"]

BESIDE = "_pefttutor_beside"
FOLLOWED = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")


def run_beside(other: Any, call: Mapping[str, Any], cache: Any) -> tuple[Tensor, Any]:
    """The logits of another model for a call of this one, without a gradient, and its cache.

    call: the arguments by name. Those that the other model doesn't take, labels, and this one's cache are left out.
    cache: the other model's own after what came before, None at the start.

    Shapes: → (batch, seq or logits_to_keep, vocabulary).
    """
    known = inspect.signature(other.forward).parameters
    every = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    left_out = {*CACHES, "labels", "return_dict"}
    device = next(other.parameters()).device
    given = {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in call.items()
        if key not in left_out and (every or key in known)
    }
    key = next((key for key in CACHES if key in known), CACHES[0])
    with torch.no_grad(), evaluating(other):
        output = other(**given, **({} if cache is None else {key: cache}))
    return output.logits, cache_made(output)


def check_call(call: Mapping[str, Any]) -> None:
    """Raise ValueError for what another model can't take over from a call."""
    if call.get("inputs_embeds") is not None:
        raise ValueError(
            "inputs_embeds are the model's own, and the expert and the anti-expert have other embeddings: "
            "give input_ids."
        )
    mask = call.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise ValueError(
            "ProxyTuning masks the two other models' texts, too, so attention_mask must be (batch, seq), and this one "
            "is made for the model's own cache: in generate leave cache_implementation out."
        )


def places(mask: Tensor, tokens: Tensor) -> Tensor:
    """The places of a text's last tokens in it, padding not counted.

    >>> places(torch.tensor([[0, 1, 1]]), torch.tensor([[7, 8]]))
    tensor([[0, 1]])

    Shapes: (batch, whole seq), (batch, seq) → (batch, seq).
    """
    return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]


def caches_beside(cache: Any, key: str) -> tuple[Any, ...] | None:
    """The caches that `cache` carries along under `key`; None if it carries none."""
    return vars(cache).get(BESIDE, {}).get(key) if hasattr(cache, "__dict__") else None


def carry(cache: Any, key: str, others: Sequence[Any]) -> None:
    """Let `cache` carry others along, which follow it when its rows are reordered or its end is cut off."""
    if not hasattr(cache, "__dict__"):
        return
    vars(cache).setdefault(BESIDE, {})[key] = tuple(others)
    for name in FOLLOWED:
        if hasattr(cache, name):
            vars(cache)[name] = partial(_all, cache, name)


def _all(cache: Any, name: str, *args: Any, **kwargs: Any) -> None:
    """What is done to a cache is done to those that it carries."""
    getattr(type(cache), name)(cache, *args, **kwargs)
    for others in vars(cache)[BESIDE].values():
        for other in others:
            if hasattr(other, name):
                getattr(other, name)(*args, **kwargs)


def vocabulary(model: nn.Module) -> int:
    """How many tokens a causal language model chooses from. Raises: ValueError if it isn't one."""
    kind, can = type(model).__name__, getattr(model, "can_generate", None)
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    able = callable(can) and can()
    if not able or both:
        what = "has an encoder, whose text the others don't get" if able else "isn't one"
        raise ValueError(f"ProxyTuning steers what a causal language model writes next, and a {kind} {what}.")
    return int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
