"""Which forward pass belongs to which architecture, by the config's `model_type`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pefttutor.memory.decoders import bloom, gpt2, llama
from pefttutor.memory.encoders import bert, t5, vit
from pefttutor.memory.paper import Paper
from pefttutor.memory.step import Step
from pefttutor.memory.tape import Tape

__all__ = ["FAMILIES"]

FAMILIES: dict[str, Callable[[Tape, Any, Step], Paper]] = {
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
