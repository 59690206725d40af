"""The model without values that an estimate is about, and the bytes of what it holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.memory.checks import QUANTIZATION, check_config, check_length, check_method, named_dtype
from pefttutor.memory.meta import on_meta, skeleton, with_method
from pefttutor.method import attached

__all__ = ["added_buffers", "prepared", "weight_bytes"]


def prepared(
    model_or_config: Any, method: Any, length: int, *, weight_dtype: Any, adapter_dtype: Any
) -> tuple[Any, set[Tensor]]:
    """The model without values, with the method attached, and the base's own parameters and buffers.

    >>> from transformers import GPT2Config
    >>> model, base = prepared(GPT2Config(), None, 512, weight_dtype="bfloat16", adapter_dtype=None)
    >>> model.dtype, {parameter.device.type for parameter in base}
    (torch.bfloat16, {'meta'})

    Raises: TypeError for what is no method; ValueError for a config that the estimator doesn't know or that contradicts
        itself, a sequence beyond its positions, and an unknown dtype; what `attach` raises.
    """
    check_method(method)
    config = getattr(model_or_config, "config", model_or_config)
    check_config(config)
    if config.model_type != "vit":
        check_length(config, length)
    weight, adapter = named_dtype("weight_dtype", weight_dtype), named_dtype("adapter_dtype", adapter_dtype)
    if isinstance(model_or_config, nn.Module):
        model: Any = on_meta(model_or_config)
    else:
        model = skeleton(config, dtype=weight or torch.float32)
    base = {*model.parameters(), *model.buffers()}
    base -= set(_added(model))
    if weight is not None:
        _cast(base & set(model.parameters()), weight)
    if method is not None:
        model = with_method(method, model)
    if adapter is not None:
        _cast(set(model.parameters()) - base, adapter)
    return model, base


def weight_bytes(model: Any, base: set[Tensor], quantization: str | None) -> dict[str, int]:
    """Bytes of the base, of its quantised layers, and of what the method added, its buffers included.

    >>> layer = nn.Linear(3, 2)
    >>> weight_bytes(layer, {*layer.parameters()}, quantization=None)
    {'weights': 32, 'quantized_weights': 0, 'adapter_weights': 0}

    Raises: ValueError if a layer that is to be quantised trains.
    """
    quantized = _quantized(model) if quantization else set()
    added = sum(buffer.nbytes for buffer in model.buffers() if buffer not in base)
    sizes = {"weights": 0, "quantized_weights": 0, "adapter_weights": added}
    for parameter in model.parameters():
        if parameter in quantized:
            sizes["quantized_weights"] += round(parameter.numel() * QUANTIZATION[quantization or ""] / 8)
        else:
            sizes["weights" if parameter in base else "adapter_weights"] += parameter.nbytes
    return sizes


def _quantized(model: Any) -> set[nn.Parameter]:
    """The weights of the frozen linear layers, without the output head's."""
    head = model.get_output_embeddings()
    kinds = ("Linear", "Conv1D")  # and what a method made of them
    linear = [m for m in model.modules() if any(kind.__name__ in kinds for kind in type(m).__mro__)]
    weights = {m.weight for m in linear if m is not head}
    if trained := [w for w in weights if w.requires_grad]:
        raise ValueError(
            f"quantization: {len(trained)} linear layers train, and a quantised weight can't; use a method that freezes"
        )
    return weights


def _cast(parameters: set[Tensor], dtype: torch.dtype) -> None:
    for parameter in parameters:
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _added(model: nn.Module) -> list[Tensor]:
    """What the attachments have put beside the base's own parameters and buffers."""
    return [t for attachment in attached(model).values() for part in attachment.parts for t in part.added()]


def added_buffers(model: nn.Module) -> list[Tensor]:
    """What attachments hold beside parameters, such as the places of chosen entries, each tensor once.

    >>> from pefttutor.selective import PaFi
    >>> added_buffers(PaFi(fraction=0.5).attach(nn.Linear(4, 2, bias=False)))[0].shape         # 4 of 8 entries
    torch.Size([4])
    """
    added = _added(model)
    return list(dict.fromkeys(t for t in added if not isinstance(t, nn.Parameter)))
