"""`estimate_serving`: the bytes of a model that answers, with its cache of keys and values and many adapters."""

from __future__ import annotations

from typing import Any

from pefttutor.memory.attention import window
from pefttutor.memory.breakdown import Breakdown
from pefttutor.memory.checks import QUANTIZATION, named_dtype, one_of, whole
from pefttutor.memory.weights import prepared, weight_bytes
from pefttutor.method import attached, freeze

__all__ = ["estimate_serving"]


def estimate_serving(
    model_or_config: Any,
    method: Any = None,
    *,
    adapters: int = 1,
    batch_size: int = 1,
    sequence_length: int = 512,
    target_length: int | None = None,
    weight_dtype: Any = None,
    adapter_dtype: Any = None,
    cache_dtype: Any = None,
    quantization: str | None = None,
) -> Breakdown:
    """One base, `adapters` sets of what `method` adds or trains, and the keys and values of every token so far.

    keys and values = 2 · layers · heads_kv · head_dim · batch_size · sequence_length numbers
    (of a layer with a sliding window: its last window − 1 tokens at most, as transformers keeps them)

    >>> from transformers import LlamaConfig
    >>> estimate_serving(LlamaConfig(), sequence_length=2048, weight_dtype="bfloat16").kv_cache / 2**30
    1.0

    method: None is the base alone, of which nothing trains, or the method that the model carries already.
    A method that trains weights of the base (BitFit) needs its own copy of those for each adapter after the first.
    An encoder-decoder caches its decoder's own tokens (target_length) and its view of the input (sequence_length).
    cache_dtype: None takes the dtype of the weights. The other arguments are those of `estimate`.

    Raises: ValueError as `estimate` does, and for an encoder, which has no cache.
    """
    target_length = sequence_length if target_length is None else target_length
    whole(
        adapters=adapters, batch_size=batch_size, sequence_length=sequence_length, target_length=target_length
    )
    one_of("quantization", quantization, (None, *QUANTIZATION))
    model, base = prepared(
        model_or_config, method, sequence_length, weight_dtype=weight_dtype, adapter_dtype=adapter_dtype
    )
    config: Any = model.config
    alone = config.model_type in ("t5", "mt5") and not hasattr(model, "decoder")
    if config.model_type in ("bert", "vit") or alone:
        raise ValueError(f"{type(model).__name__} is an encoder: it writes no text, so it caches nothing")
    if method is None and not attached(model):
        freeze(model)
    sizes: dict[str, Any] = weight_bytes(model, base, quantization)
    per_adapter = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    per_adapter += sum(buffer.nbytes for buffer in model.buffers() if buffer not in base)
    sizes["adapter_weights"] += (adapters - 1) * per_adapter
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or _head_dim(config)
    width = (named_dtype("cache_dtype", cache_dtype) or next(model.parameters()).dtype).itemsize
    if config.is_encoder_decoder:
        tokens = config.num_decoder_layers * (sequence_length + target_length)
    else:
        windows = [window(config, layer) for layer in range(config.num_hidden_layers)]
        tokens = sum(min(sequence_length, limit - 1) if limit else sequence_length for limit in windows)
    values = sum(p.numel() for p in model.parameters())
    cache = 2 * heads * head_dim * batch_size * tokens * width
    return Breakdown(**sizes, kv_cache=cache, values=values)


def _head_dim(config: Any) -> int:
    return config.hidden_size // config.num_attention_heads
