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
    "check_attention",
    "check_config",
    "check_length",
    "check_method",
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

# What a config counts, where it has it; None there means that the model takes a usual value.
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_decoder_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "d_kv",
    "intermediate_size",
    "vocab_size",
)


def one_of(name: str, value: Any, known: Collection[Any]) -> Any:
    """The value. Raises: ValueError, with all that is known, if it is none of these.

    >>> one_of("device", "tpu", ("cuda", "cpu"))
    Traceback (most recent call last):
    ValueError: device is 'tpu'; the estimator knows 'cuda', 'cpu'
    """
    if value not in known:
        shown = ", ".join(repr(choice) if isinstance(choice, str) else str(choice) for choice in known)
        raise ValueError(f"{name} is {value!r}; the estimator knows {shown}")
    return value


def named_dtype(name: str, value: Any) -> torch.dtype | None:
    """A dtype that is given by its name or as itself; None stays None.

    >>> named_dtype("weight_dtype", "bfloat16"), named_dtype("weight_dtype", torch.float16)
    (torch.bfloat16, torch.float16)

    Raises: ValueError for any other.
    """
    if value is None or value in DTYPES.values():
        return value
    return DTYPES[one_of(name, str(value).removeprefix("torch."), DTYPES)]


def whole(**values: Any) -> None:
    """Raises: ValueError for the first of the values that is no whole number ≥ 1.

    >>> whole(batch_size=8, sequence_length=0)
    Traceback (most recent call last):
    ValueError: sequence_length is 0; it must be a whole number ≥ 1
    """
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number ≥ 1")


def check_config(config: Any) -> None:
    """Raises: ValueError for an architecture without formulas, or a config whose numbers don't fit together.

    >>> from types import SimpleNamespace
    >>> check_config(SimpleNamespace(model_type="llama", hidden_size=10, num_attention_heads=4))
    Traceback (most recent call last):
    ValueError: the config contradicts itself: hidden_size 10 is no multiple of 4 heads
    """
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        shown = kind or type(config).__name__
        raise ValueError(
            f"architecture {shown!r} has no formula for its activations; there are some for {', '.join(FAMILIES)}. "
            "Measure it instead: pefttutor.memory.measure(step, model=model)."
        )
    for name in SIZES:
        if getattr(config, name, None) is not None:
            whole(**{f"the config's {name}": getattr(config, name)})
    if kind == "vit" and _side(config.image_size) < _side(config.patch_size):
        raise ValueError(
            f"the config contradicts itself: image_size {config.image_size} is smaller than patch_size "
            f"{config.patch_size}, so a picture has no patch"
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


def _side(size: Any) -> int:
    return size if isinstance(size, int) else min(size)


def check_attention(model: Any, attention: str | None) -> str:
    """The attention that a model's class computes: the one that is asked for; sdpa before eager if that is None.

    >>> from types import SimpleNamespace
    >>> check_attention(SimpleNamespace(_supports_sdpa=True, _supports_flash_attn=False), None)
    'sdpa'

    Raises: ValueError for one that the class doesn't have.
    """
    has = {"eager": True, "sdpa": model._supports_sdpa, "flash_attention_2": model._supports_flash_attn}
    known = [mode for mode in ATTENTION if has[mode]]
    if attention is None:
        return "sdpa" if "sdpa" in known else "eager"
    if one_of("attention", attention, ATTENTION) not in known:
        shown = " or ".join(repr(mode) for mode in known)
        raise ValueError(
            f"attention is {attention!r}, but transformers computes {model.config.model_type.upper()}'s attention "
            f"as {shown} only"
        )
    return attention


def check_method(method: Any) -> None:
    """Raises: TypeError for what is no method.

    >>> check_method(dict)
    Traceback (most recent call last):
    TypeError: method is the class dict; give an instance of it: dict(…)
    """
    if isinstance(method, type):
        raise TypeError(
            f"method is the class {method.__name__}; give an instance of it: {method.__name__}(…)"
        )
    if method is not None and not hasattr(method, "attach"):
        raise TypeError(
            f"method is {method!r}; expected something with attach(model), such as pefttutor.LoRA(r=8), or None"
        )


def check_length(config: Any, length: int) -> None:
    """Raises: ValueError for a sequence longer than the model's positions (T5 and BLOOM have no such limit).

    >>> from types import SimpleNamespace
    >>> check_length(SimpleNamespace(model_type="bert", max_position_embeddings=512), 600)
    Traceback (most recent call last):
    ValueError: sequence_length is 600, but this model has positions for 512 tokens at most
    """
    if config.model_type in ("t5", "mt5"):
        return
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ValueError(
            f"sequence_length is {length}, but this model has positions for {longest} tokens at most"
        )
