"""`estimate`: the bytes of a training step, from a config alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pefttutor.memory.beside import ladders, spoken
from pefttutor.memory.breakdown import Breakdown
from pefttutor.memory.checks import OPTIMIZERS, QUANTIZATION, check_attention, named_dtype, one_of, whole
from pefttutor.memory.families import FAMILIES
from pefttutor.memory.heads import head
from pefttutor.memory.layers import Making, run_alone
from pefttutor.memory.paper import FLOAT, Paper
from pefttutor.memory.step import Step
from pefttutor.memory.tape import Tape
from pefttutor.memory.weights import prepared, weight_bytes
from pefttutor.method import attached
from pefttutor.parts.gates import PrefixGates
from pefttutor.parts.network import Made
from pefttutor.train.losses import causal_lm_loss

__all__ = ["estimate"]


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
    attention: str | None = None,
    padding: bool = False,
    gradient_checkpointing: bool | None = None,
    loss: Any = None,
    logits_copies: int = 1,
    device: str = "cuda",
) -> Breakdown:
    """The bytes of one training step: nothing is allocated, nothing runs.

    total = weights + gradients + optimizer + activations, with N values in all and N_t that train
    (AdamW in float32: 4 N + 4 N_t + 8 N_t + activations)

        estimate(transformers.LlamaConfig(), pefttutor.LoRA(r=8), weight_dtype="bfloat16")

    >>> from transformers import GPT2Config
    >>> needed = estimate(GPT2Config(), batch_size=1, sequence_length=512)
    >>> needed.weights / needed.values, needed.gradients / needed.trained, needed.optimizer / needed.trained
    (4.0, 4.0, 8.0)

    model_or_config: a transformers model, or a config, whose model is then built without values: of the class that
        its `architectures` names where the estimator knows that one's head, else the usual one for training. A model
        that is adapted already is taken as it is. From a config, transformers ties the output head of T5 and MT5 to
        the embedding, which T5 1.1 and mT5 don't; give a model with its own lm_head then.
    method: attached to a copy without values; None trains everything (or what the model trains already). What chooses
        entries by their values, such as PaFi, then chooses in every tensor by its size, an upper bound (seen: 11–21 %
        more activations than after attaching); of a model that it is attached to the estimate is exact.
    target_length: tokens of an encoder-decoder's labels (None: as many as sequence_length).
    weight_dtype: the dtype of the base (None: as the model is; float32 for a config). adapter_dtype: None takes what
        `attach` made. gradient_dtype, optimizer_dtype: None takes the dtype of the parameter, as PyTorch does.
    optimizer: adamw, adam, momentum or sgd. master_weights: whether there is a float32 copy of what trains in 16 bits,
        which mixed-precision trainers keep with the optimizer.
    quantization: nf4, nf4-double or int8 for the frozen linear layers, the output head left out.
    attention: eager, sdpa or flash_attention_2 (None: sdpa where the architecture has it, else eager).
    padding: whether the texts of a batch differ in length. Under sdpa every layer then keeps a mask, and repeats keys
        and values that heads share; so it does without padding where a sliding window is no longer than the sequence.
    gradient_checkpointing: whether every transformer layer is made again for its backward pass, as transformers does it
        (None: as the model is).
    loss: `losses.causal_lm_loss`, or None for the model's own.
    logits_copies: how many float32 tensors as large as the logits exist at once: autograd keeps 1, and the first step
        backwards needs 3 (on an H200, whose allocator saw 1,624 MiB in a LoRA step: 1,260 MiB with 1, 1,510 with 3).
    device: where the step would run: dropout masks and fused attention differ between cuda and cpu.

    Not counted: a CUDA context, fragmentation, what operations only pass through, autocast, which keeps 16-bit copies
    beside float32 weights (dtypes are taken as they are), and, of the LSTM that makes PTuning's tokens, what a kernel
    keeps beyond torch's own formula (seen on a CPU, whose oneDNN keeps 2.6 to 3.2 times as much; a text adds nothing).
    Shapes: ids (batch_size, sequence_length); a ViT takes its length from its picture.
    Raises: ValueError for an unknown architecture, dtype, optimizer or attention, for a sequence beyond the model's
        positions, for a config that contradicts itself, and for a method that trains or wraps what the formulas don't
        reach; TypeError for what is no method; what `attach` raises.
    """
    whole(batch_size=batch_size, sequence_length=sequence_length, logits_copies=logits_copies)
    target_length = sequence_length if target_length is None else target_length
    whole(target_length=target_length)
    one_of("optimizer", optimizer, OPTIMIZERS)
    one_of("quantization", quantization, (None, *QUANTIZATION))
    one_of("device", device, ("cuda", "cpu"))
    one_of("loss", loss, (None, causal_lm_loss))
    one_of("gradient_checkpointing", gradient_checkpointing, (None, True, False))
    one_of("padding", padding, (True, False))
    model, base = prepared(
        model_or_config, method, sequence_length, weight_dtype=weight_dtype, adapter_dtype=adapter_dtype
    )
    attention = check_attention(model, attention)
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
    parts = [part for attachment in attached(model).values() for part in attachment.parts]
    tape = Tape(parts, device, lean=loss is not None)
    logits = _walked(tape, model, Step(batch_size, sequence_length, target_length, attention, padding))
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


def _walked(tape: Tape, model: Any, step: Step) -> Paper:
    """The logits, after one forward pass on the tape. Raises: ValueError where it can't see all that trains."""
    instead = "Measure it instead: pefttutor.memory.measure(step, model=model)."
    # Virtual tokens lengthen a text inside of the body, and the head sees the text alone.
    longer = step.sequence_length + sum(part.lengthens() for part in tape.parts)
    in_attention = [part for part in tape.parts if part.precedes() or isinstance(part, PrefixGates)]
    inside = replace(
        step,
        sequence_length=longer,
        prefix=sum(part.precedes() for part in tape.parts),
        prefix_trains=tape.trains(*(p for part in in_attention for p in part.trained())),
    )
    for part in [part for part in tape.parts if isinstance(part, Made) and part.on]:
        run_alone(tape, Making(part), Paper(1, 1, FLOAT, False), "embeddings")
    try:
        hidden = FAMILIES[model.config.model_type](tape, model, inside)
        for ladder in reversed(ladders(model)):
            hidden = spoken(tape, model, ladder, inside, hidden)
        if longer > step.sequence_length and not model.config.is_encoder_decoder:
            hidden = hidden.like(rows=step.batch_size * step.sequence_length)
        logits = head(tape, model, hidden, step)
    except AttributeError as error:
        raise ValueError(
            f"the estimator walks through {type(model).__name__} layer by layer, and {error}. It can follow a method "
            f"that puts something in the place of single layers, not of a whole mlp or block. {instead}"
        ) from error
    missed = [name for name, p in model.named_parameters() if p.requires_grad and p not in tape.met]
    if missed:
        raise ValueError(
            f"{missed[0]!r} trains, and the estimator met no layer that uses it ({len(missed)} such tensors), so what "
            f"it keeps for the backward pass isn't known. {instead}"
        )
    return logits


def _switch_checkpointing(model: Any, on: bool) -> None:
    for module in model.modules():
        if hasattr(type(module), "gradient_checkpointing") or "gradient_checkpointing" in vars(module):
            module.gradient_checkpointing = on


def _numel(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)
