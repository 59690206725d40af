"""`estimate`: the bytes of a training step, from a config alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pefttutor.losses import causal_lm_loss
from pefttutor.memory.breakdown import Breakdown
from pefttutor.memory.checks import (
    OPTIMIZERS,
    QUANTIZATION,
    check_attention,
    check_config,
    check_length,
    named_dtype,
    one_of,
    whole,
)
from pefttutor.memory.families import FAMILIES
from pefttutor.memory.heads import head
from pefttutor.memory.meta import attached, on_meta, skeleton
from pefttutor.memory.step import Step
from pefttutor.memory.tape import Tape
from pefttutor.method import adapted

__all__ = ["estimate", "prepared"]


def estimate(
    model_or_config: Any,
    method: Any = None,
    *,
    batch_size: int = 1,
    sequence_length: int = 512,
    target_length: int | None = None,
    weight_dtype: Any = None,
    adapter_dtype: Any = None,
    gradient_dtype: Any = None,
    optimizer: str = "adamw",
    optimizer_dtype: Any = None,
    master_weights: bool = False,
    quantization: str | None = None,
    attention: str = "sdpa",
    gradient_checkpointing: bool | None = None,
    loss: Any = None,
    logits_copies: int = 1,
    device: str = "cuda",
) -> Breakdown:
    """The bytes of one training step: nothing is allocated, nothing runs.

        estimate(transformers.LlamaConfig(), pefttutor.LoRA(r=8), batch_size=1, sequence_length=512,
                 weight_dtype="bfloat16")

    total = weights + gradients + optimizer + activations, with N values in all and N_t that train
    (AdamW in float32: 4 N + 4 N_t + 8 N_t + activations)

    model_or_config: a transformers model, or a config, whose model is then built without values. A model that is
        adapted already is taken as it is.
    method: attached to a copy without values; None trains everything (or what the model trains already).
    target_length: tokens of an encoder-decoder's labels (None: as many as sequence_length).
    weight_dtype: of the base (None: as the model is; float32 for a config). adapter_dtype, gradient_dtype,
        optimizer_dtype: None takes what `attach` made, and the dtype of the parameter, as PyTorch does.
    optimizer: adamw, adam, momentum or sgd. master_weights: a float32 copy of what trains in 16 bits, which
        mixed-precision trainers keep with the optimizer.
    quantization: nf4, nf4-double or int8 for the frozen linear layers, the output head left out.
    attention: eager, sdpa or flash_attention_2. gradient_checkpointing: every transformer layer, as transformers does.
    loss: `losses.causal_lm_loss`, or None for the model's own.
    logits_copies: how many float32 tensors as large as the logits exist at once; autograd keeps 1.
    device: where the step would run: dropout masks and fused attention differ between cuda and cpu.

    Not counted: a CUDA context, fragmentation, what operations only pass through, padding's masks, and autocast,
    which keeps 16-bit copies beside float32 weights: dtypes are taken as they are.
    Shapes: ids (batch_size, sequence_length); a ViT takes its length from its picture.
    Raises: ValueError for an unknown architecture, dtype, optimizer or attention, a sequence beyond the model's
        positions, a config that contradicts itself; what `attach` raises.
    """
    whole(batch_size=batch_size, sequence_length=sequence_length, logits_copies=logits_copies)
    target_length = sequence_length if target_length is None else target_length
    whole(target_length=target_length)
    one_of("optimizer", optimizer, OPTIMIZERS)
    one_of("quantization", quantization, (None, *QUANTIZATION))
    one_of("device", device, ("cuda", "cpu"))
    one_of("loss", loss, (None, causal_lm_loss))
    if (
        attention != "eager"
        and getattr(getattr(model_or_config, "config", model_or_config), "model_type", "") == "bloom"
    ):
        raise ValueError(
            f"attention is {attention!r}, but transformers computes BLOOM's attention as 'eager' only"
        )
    model, base = prepared(
        model_or_config, method, sequence_length, weight_dtype=weight_dtype, adapter_dtype=adapter_dtype
    )
    check_attention(model.config, attention)
    if gradient_checkpointing is not None:
        _switch_checkpointing(model, gradient_checkpointing)

    gradient, state = (
        named_dtype("gradient_dtype", gradient_dtype),
        named_dtype("optimizer_dtype", optimizer_dtype),
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * (gradient or p.dtype).itemsize for p in trained)
    moments = OPTIMIZERS[optimizer] * sum(p.numel() * (state or p.dtype).itemsize for p in trained)
    if master_weights:
        moments += sum(4 * p.numel() for p in trained if p.dtype.itemsize < 4)
    method = method or adapted(model)
    own = _stated_by(method, model)
    if own:  # in values: a method that keeps fewer than it trains says so
        gradients = gradients * own.get("gradients", _numel(trained)) // max(1, _numel(trained))
        moments = moments * own.get("optimizer", _numel(trained)) // max(1, _numel(trained))

    tape = Tape(method, device, lean=loss is not None)
    step = Step(batch_size, sequence_length, target_length, attention)
    hidden = FAMILIES[model.config.model_type](tape, model, step)
    logits = head(tape, model, hidden, step)
    activations = tape.bytes_by_kind()
    activations["logits and loss"] += (logits_copies - 1) * 4 * logits.numel
    return Breakdown(
        **weight_bytes(model, base, quantization),
        gradients=gradients,
        optimizer=moments,
        activations=activations,
        values=_numel(model.parameters()),
        trained=_numel(trained),
    )


def prepared(
    model_or_config: Any, method: Any, length: int, *, weight_dtype: Any, adapter_dtype: Any
) -> tuple[Any, set[nn.Parameter]]:
    """The model without values, the method attached, and the base's own parameters."""
    config = getattr(model_or_config, "config", model_or_config)
    check_config(config)
    if config.model_type != "vit":
        check_length(config, length)
    weight, adapter = named_dtype("weight_dtype", weight_dtype), named_dtype("adapter_dtype", adapter_dtype)
    if isinstance(model_or_config, nn.Module):
        model: Any = on_meta(model_or_config)
    else:
        model = skeleton(config, dtype=weight or torch.float32)
    base = set(model.parameters())
    if adapted(model):
        names = {
            name for name, _ in skeleton(config, dtype=torch.float32, like=type(model)).named_parameters()
        }
        base -= {p for name, p in model.named_parameters() if p.requires_grad and name not in names}
    if weight is not None:
        _cast(base, weight)
    if method is not None:
        model = attached(method, model)
    if adapter is not None:
        _cast(set(model.parameters()) - base, adapter)
    return model, base


def weight_bytes(model: Any, base: set[nn.Parameter], quantization: str | None) -> dict[str, int]:
    """Bytes of the base, of its quantised layers, and of what the method added."""
    quantized = _quantized(model) if quantization else set()
    found = {"weights": 0, "quantized_weights": 0, "adapter_weights": 0}
    for parameter in model.parameters():
        if parameter in quantized:
            found["quantized_weights"] += round(parameter.numel() * QUANTIZATION[quantization or ""] / 8)
        else:
            found["weights" if parameter in base else "adapter_weights"] += parameter.nbytes
    return found


def _quantized(model: Any) -> set[nn.Parameter]:
    """The weights of the frozen linear layers but the head."""
    head = model.get_output_embeddings()
    kinds = ("Linear", "Conv1D")  # and what a method made of them
    linear = [m for m in model.modules() if any(kind.__name__ in kinds for kind in type(m).__mro__)]
    weights = {m.weight for m in linear if m is not head}
    if trained := [w for w in weights if w.requires_grad]:
        raise ValueError(
            f"quantization: {len(trained)} linear layers train, and a quantised weight can't; use a method that freezes"
        )
    return weights


def _cast(parameters: set[nn.Parameter], dtype: torch.dtype) -> None:
    for parameter in parameters:
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _switch_checkpointing(model: Any, on: bool) -> None:
    for module in model.modules():
        if hasattr(type(module), "gradient_checkpointing") or "gradient_checkpointing" in vars(module):
            module.gradient_checkpointing = on


def _stated_by(method: Any, model: nn.Module) -> dict[str, int]:
    return method.memory(model) if hasattr(method, "memory") else {}


def _numel(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)
