"""Which forward pass belongs to which architecture, by the config's `model_type`."""

from __future__ import annotations

from collections.abc import Callable

from pefttutor.memory.decoders import bloom, gpt2, llama
from pefttutor.memory.encoders import bert, t5, vit
from pefttutor.memory.paper import Paper

__all__ = ["FAMILIES"]

FAMILIES: dict[str, Callable[..., Paper]] = {  # (tape, model, step)
    "llama": llama,
    "mistral": llama,
    "qwen2": llama,
    "qwen3": llama,
    "gpt2": gpt2,
    "bloom": bloom,
    "bert": bert,
    "vit": vit,
    "t5": t5,
    "mt5": t5,
}
