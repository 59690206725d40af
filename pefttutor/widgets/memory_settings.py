"""What the memory widget can be set to, what such a setting needs, and what to change to make it fit.

Data only; `pefttutor.widgets.memory` draws it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from pefttutor.lowrank import LoRA
from pefttutor.memory import GIB, Breakdown, estimate
from pefttutor.selective import LastLayers, LayerNormTuning, PaFi

__all__ = [
    "GPUS",
    "METHODS",
    "MODELS",
    "PRECISIONS",
    "Change",
    "Setting",
    "advice",
    "attention_of",
    "needs",
]

# GiB that PyTorch finds, as its out-of-memory messages say: less than the 16 GB, 24 GB and 80 GB on the box.
GPUS = {"T4": 14.6, "RTX 4090": 23.6, "A100 80 GB": 79.1, "H100": 79.1}
RESERVE = 1  # GiB that a CUDA context and fragmentation take: an assumption, not a measurement


def _config(kind: str, **numbers: Any) -> Callable[[], Any]:
    """A config when it is asked for: importing transformers takes seconds."""

    def build() -> Any:
        import transformers

        return getattr(transformers, f"{kind}Config")(**numbers)

    return build


def _llama(*numbers: int) -> dict[str, int]:
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    return dict(zip((*names, "vocab_size", "max_position_embeddings"), numbers, strict=True))


_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
MODELS: dict[str, Callable[[], Any]] = {
    "GPT-2": _config("GPT2"),
    "BERT-large": _config("Bert", **_LARGE),
    "ViT-L/16": _config("ViT", **_LARGE, num_labels=1000),
    "T5-3B": _config(
        "T5", d_model=1024, d_ff=16384, d_kv=128, num_heads=32, num_layers=24, decoder_start_token_id=0
    ),
    "BLOOM-7B1": _config("Bloom", vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32),
    "Llama-2-7B": _config("Llama", **_llama(4096, 11008, 32, 32, 32, 32000, 4096)),
    "Mistral-7B": _config("Mistral", **_llama(4096, 14336, 32, 32, 8, 32000, 32768)),
    "Qwen2.5-7B": _config("Qwen2", **_llama(3584, 18944, 28, 28, 4, 152064, 32768)),
    "Llama-3.1-8B": _config("Llama", **_llama(4096, 14336, 32, 32, 8, 128256, 131072)),
    "Llama-2-70B": _config("Llama", **_llama(8192, 28672, 80, 64, 8, 32000, 4096)),
}

# As the layers are called in Llama, Mistral, Qwen and ViT; BERT; GPT-2; BLOOM; T5.
_QUERY_VALUE = r".*\.(q_proj|v_proj|query|value|c_attn|query_key_value|q|v)"
_EVERY = (
    r".*\.([qkvo]_proj|(gate|up|down)_proj|fc1|fc2|query|key|value|dense|c_attn|c_fc|c_proj|query_key_value"
    r"|dense_h_to_4h|dense_4h_to_h|[qkvo]|wi|wi_0|wi_1|wo)"
)
METHODS: dict[str, Any] = {
    "full fine-tuning": None,
    "LoRA r = 8 on query and value": LoRA(r=8, target_modules=_QUERY_VALUE),
    "LoRA r = 64 on every linear layer": LoRA(r=64, target_modules=_EVERY),
    "the norms alone": LayerNormTuning(),
    "the last quarter of the layers": LastLayers(),
    "1 % of the entries, the smallest": PaFi(fraction=0.01),
}

_HALF = {"weight_dtype": "bfloat16"}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": _HALF | {"adapter_dtype": "bfloat16"},
    "bfloat16, Adam and master copy in float32": _HALF
    | {"optimizer_dtype": "float32", "master_weights": True},
    "4 bits (NF4), adapters in float32": _HALF | {"quantization": "nf4-double"},
}
_FLOAT32, _BFLOAT16, _MIXED, _NF4 = PRECISIONS


@dataclass(frozen=True)
class Setting:
    """One position of the widget's controls.

    >>> Setting("Llama-2-7B", "full fine-tuning").batch_size
    1
    """

    model: str
    method: str
    precision: str = _BFLOAT16
    batch_size: int = 1
    length: int = 512
    optimizer: str = "adamw"
    attention: str = "sdpa"
    checkpointing: bool = False


def needs(setting: Setting, methods: Mapping[str, Any]) -> Breakdown:
    """`memory.estimate` of a setting; what was computed once is kept. Raises: ValueError as `estimate` does.

    >>> needs(Setting("GPT-2", "full fine-tuning"), METHODS).trained
    124439808
    """
    return _needs(setting, _Named(repr(methods[setting.method]), methods[setting.method]))


@dataclass(frozen=True)
class _Named:
    """A method that can be looked up, though its lists can't."""

    words: str
    method: Any = field(compare=False)


def attention_of(setting: Setting) -> str:
    """The attention that is computed: transformers has one way only for BLOOM's.

    >>> attention_of(Setting("BLOOM-7B1", "full fine-tuning", attention="sdpa"))
    'eager'
    """
    return "eager" if setting.model.startswith("BLOOM") else setting.attention


@lru_cache(maxsize=512)
def _needs(setting: Setting, named: _Named) -> Breakdown:
    return estimate(
        MODELS[setting.model](),
        named.method,
        batch_size=setting.batch_size,
        sequence_length=setting.length,
        optimizer=setting.optimizer,
        attention=attention_of(setting),
        gradient_checkpointing=setting.checkpointing,
        **PRECISIONS[setting.precision],
    )


@dataclass(frozen=True)
class Change:
    """What to change, how many bytes the step needs then, and whether that fits.

    >>> Change("gradient checkpointing", total=2**30, fits=True).words
    'gradient checkpointing'
    """

    words: str
    total: int
    fits: bool


def advice(setting: Setting, methods: Mapping[str, Any], capacity_gib: float) -> list[Change]:
    """Each change that saves something, by itself; then, if none is enough, one after the other until it fits.

    >>> setting = Setting("GPT-2", "full fine-tuning", length=128)
    >>> [change.words for change in advice(setting, {"full fine-tuning": None}, capacity_gib=2)]
    ['gradient checkpointing']
    """
    limit = int((capacity_gib - RESERVE) * GIB)

    def tried(words: str, changed: Setting) -> Change:
        total = needs(changed, methods).total
        return Change(words, total, total <= limit)

    before = needs(setting, methods).total
    if tried("", setting).fits:
        return []
    single = [tried(words, replace(setting, **values)) for words, values in _moves(setting, methods, limit)]
    helpful = [change for change in single if change.total < 0.99 * before]
    helpful.sort(key=lambda change: change.total)
    if any(change.fits for change in helpful):
        return helpful
    together, words = setting, []
    while move := next(iter(_moves(together, methods, limit)), None):
        total = needs(together, methods).total
        changed = replace(together, **move[1])
        if needs(changed, methods).total < 0.99 * total:
            words.append(move[0])
        together = changed
        if (change := tried(" + ".join(words), together)).fits:
            return [*helpful, change]
    return helpful


def _moves(setting: Setting, methods: Mapping[str, Any], limit: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What can still be changed, the cheapest for the result first."""
    if setting.attention == "eager":
        yield "fused attention", {"attention": "sdpa"}
    if setting.precision in (_FLOAT32, _MIXED):
        yield "bfloat16 throughout", {"precision": _BFLOAT16}
    if not setting.checkpointing:
        yield "gradient checkpointing", {"checkpointing": True}
    if setting.batch_size > 1:
        batch_size = _batch_that_fits(setting, methods, limit)
        yield f"batch {batch_size} (accumulate gradients)", {"batch_size": batch_size}
    if methods[setting.method] is None:
        frozen = [name for name, method in methods.items() if method is not None]
        yield from ((name, {"method": name}) for name in frozen[:1])
    elif setting.precision != _NF4:
        yield "a 4-bit base under bfloat16", {"precision": _NF4}
    if setting.length > 128:
        yield f"{setting.length // 2} tokens", {"length": setting.length // 2}


def _batch_that_fits(setting: Setting, methods: Mapping[str, Any], limit: int) -> int:
    """The largest power of two below the batch that fits, or 1. What a step needs is a line in its batch."""
    of_one = needs(replace(setting, batch_size=1), methods).total
    of_all = needs(setting, methods).total
    each = (of_all - of_one) / (setting.batch_size - 1)
    largest = min(setting.batch_size - 1, 1 + (limit - of_one) // each)
    return 2 ** int(math.log2(largest)) if largest >= 1 else 1
