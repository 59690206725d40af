"""What the estimators refuse, and what they say then."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from pefttutor.memory.attention import ATTENTION
from pefttutor.memory.families import FAMILIES

__all__ = [
    "DTYPES",
    "OPTIMIZERS",
    "QUANTIZATION",
    "check_config",
    "check_length",
    "named_dtype",
    "one_of",
    "whole",
]

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

# Numbers that the optimizer keeps for each number that trains.
OPTIMIZERS = {"adamw": 2, "adam": 2, "momentum": 1, "sgd": 0}

# Bits a weight, scales included. NF4: one float32 scale for 64 weights; "double": that scale in 8 bits, and one
# float32 for 256 of them (QLoRA, Dettmers et al. 2023, section 3). int8: one float32 scale a row, left out here.
QUANTIZATION = {"nf4": 4 + 32 / 64, "nf4-double": 4 + 8 / 64 + 32 / (64 * 256), "int8": 8.0}


def one_of(name: str, value: Any, known: Collection[Any]) -> Any:
    if value not in known:
        shown = ", ".join(repr(choice) if isinstance(choice, str) else str(choice) for choice in known)
        raise ValueError(f"{name} is {value!r}; the estimator knows {shown}")
    return value


def named_dtype(name: str, value: Any) -> torch.dtype | None:
    """A dtype by its name or as itself; None stays None."""
    if value is None or value in DTYPES.values():
        return value
    return DTYPES[one_of(name, str(value).removeprefix("torch."), DTYPES)]


def whole(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number ≥ 1")


def check_config(config: Any) -> None:
    """Raises: ValueError for an architecture without formulas, or a config whose numbers don't fit together."""
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        shown = kind or type(config).__name__
        raise ValueError(
            f"architecture {shown!r} has no formula for its activations; there are some for {', '.join(FAMILIES)}. "
            "Measure it instead: pefttutor.memory.measure(step, model=model)."
        )
    width, heads = getattr(config, "hidden_size", 0), getattr(config, "num_attention_heads", 1)
    groups = getattr(config, "num_key_value_heads", None) or heads
    own_width = getattr(config, "head_dim", None) or kind in ("t5", "mt5")
    if not own_width and width % heads:
        raise ValueError(
            f"the config contradicts itself: hidden_size {width} is no multiple of {heads} heads"
        )
    if groups > heads or heads % groups:
        raise ValueError(
            f"the config contradicts itself: {heads} heads can't share {groups} key and value heads; "
            "num_attention_heads must be a multiple of num_key_value_heads"
        )


def check_attention(config: Any, attention: str) -> None:
    one_of("attention", attention, ATTENTION)
    if config.model_type == "bloom" and attention != "eager":
        raise ValueError(
            f"attention is {attention!r}, but transformers computes BLOOM's attention as 'eager' only"
        )


def check_length(config: Any, length: int) -> None:
    """Raises: ValueError for a sequence longer than the model's positions (T5 and BLOOM have no such limit)."""
    longest = (
        getattr(config, "max_position_embeddings", None) if config.model_type not in ("t5", "mt5") else None
    )
    if longest is not None and length > longest:
        raise ValueError(
            f"sequence_length is {length}, but this model has positions for {longest} tokens at most"
        )
