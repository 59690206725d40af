"""What all methods share: their one shape, freezing, finding and replacing layers, and counting what trains.

A method is a small frozen dataclass of its hyper-parameters. `attach(model)` freezes the base, adds what trains
and returns the same model. There is no base class: whatever has these functions is a method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pefttutor.parts.modules import adopt, find_modules, replace_module

__all__ = [
    "Method",
    "adapted",
    "adopt",
    "described_base",
    "find_modules",
    "freeze",
    "mark",
    "merged",
    "refuse_adapted",
    "replace_module",
    "saved_tensors",
    "switch_merged",
    "trainable",
    "unmark",
]


@runtime_checkable
class Method(Protocol):
    """The one shape of every method. Only `attach` is needed; `fit` calls the others where a method has them.

    penalty(model) -> Tensor                  added to the loss of every batch
    after_backward(model, step) -> None       gradients are complete, the optimizer hasn't stepped (masks)
    after_step(model, step) -> None           the optimizer has stepped, gradients are still there (budgets)
    optimizer(model, *, lr, weight_decay) -> torch.optim.Optimizer      instead of AdamW
    merge(model), unmerge(model) -> model     fold the change into the weights, take it out again
    count(model) -> int                       trained parameters by the closed formula, without attaching
    restore(model, tensors) -> model          `attach` with what was saved, where attaching anew would choose again
    loaded(model) -> None                     the saved values have been copied in
    trace(layer, x, tape, kind) -> Paper      what a layer that `attach` put in keeps for the backward pass, for
                                              `pefttutor.memory`; None for any other layer. Without it, such a layer
                                              is run alone, without values. A block that `attach` gave parameters of
                                              its own is asked about too, and its input is what is returned
    memory(model) -> dict                     {"gradients": n, "optimizer": n}: for how many values they are kept, where
                                              these aren't all that train
    """

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze the base, add what trains, mark the model (see `mark`) and return it."""


def freeze(model: nn.Module) -> nn.Module:
    """Stop training every parameter of `model`, and drop the gradients left from before."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return model


def trainable(model: nn.Module) -> dict[str, int]:
    """Name and number of values of every parameter that trains; a shared parameter counts once."""
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


# ---- which model carries which method


@dataclasses.dataclass
class _Mark:
    """What `attach` leaves on a model."""

    method: Method
    names: tuple[str, ...]  # of the tensors that the method added or trains: what is saved
    merged: bool = False
    described: dict[str, Any] | None = None  # the base, where training changes it in place


def mark(
    model: nn.Module, method: Method, *, buffers: Iterable[str] = (), described: dict[str, Any] | None = None
) -> nn.Module:
    """Note on `model` that `method` is attached: the last thing that every `attach` does.

    What requires a gradient now, and the named buffers, are what `pefttutor.save` will save. `described` is
    `describe_base` of the model as it came, for a method that changes the base's own weights.
    """
    vars(model)["_pefttutor"] = _Mark(method, (*trainable(model), *buffers), described=described)
    _open_to_checkpointing(model)
    return model


def unmark(model: nn.Module) -> None:
    """Forget that a method is attached, for a method that attaches anew with another choice."""
    vars(model).pop("_pefttutor", None)


def _find_mark(model: nn.Module) -> tuple[str, _Mark] | None:
    for name, module in model.named_modules():
        found = vars(module).get("_pefttutor")
        if found is not None:
            return name, found
    return None


def adapted(model: nn.Module) -> Method | None:
    """The method attached to `model` or to a part of it; None for a plain model."""
    found = _find_mark(model)
    return found[1].method if found else None


def refuse_adapted(model: nn.Module) -> None:
    """Raise RuntimeError if a method is attached to `model`: the first thing that every `attach` does."""
    method = adapted(model)
    if method is not None:
        raise RuntimeError(
            f"this model is already adapted, by {method}. Load the base model again, then attach."
        )


def merged(model: nn.Module) -> bool:
    """Whether the attached method is folded into the weights at the moment."""
    found = _find_mark(model)
    return found is not None and found[1].merged


def switch_merged(model: nn.Module, method: type, *, to: bool) -> None:
    """Note that `model` is merged from now on (or isn't). Raises RuntimeError if that changes nothing."""
    found = _find_mark(model)
    attached = found[1].method if found else "nothing"
    if found is None or not isinstance(attached, method):
        raise RuntimeError(
            f"merging needs a {method.__name__} attached to this model, and it has {attached}."
        )
    if found[1].merged == to:
        raise RuntimeError(
            "this model is merged already: call unmerge(model) first."
            if to
            else "this model isn't merged, so there is nothing to unmerge."
        )
    found[1].merged = to


def described_base(model: nn.Module) -> dict[str, Any] | None:
    """What `mark` was told about the base before training."""
    found = _find_mark(model)
    return found[1].described if found else None


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that make up the attached method, by name: what it added or trains."""
    found = _find_mark(model)
    if found is None:
        raise ValueError("no method is attached to this model: call attach(model) of a method first.")
    if found[0]:
        raise ValueError(f"the method is attached to the part {found[0]!r} of this model: pass that part.")
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    lost = [name for name in found[1].names if name not in tensors]
    if lost:
        raise ValueError(f"this model has lost {lost[0]!r}: was a layer replaced after attaching?")
    return {name: tensors[name].detach() for name in found[1].names}


# ---- training a frozen model under activation checkpointing


def _open_to_checkpointing(model: nn.Module) -> None:
    """Let reentrant checkpointing see that there is something to train behind frozen embeddings.

    `torch.utils.checkpoint(use_reentrant=True)` gives a block gradients only if one of its inputs requires one.
    With frozen embeddings none does, and the adapters inside learn nothing. So their output is made to require
    one, but only while checkpointing is on: otherwise that would cost a backward pass below the first adapter.
    """
    embeddings = set()
    for module in model.modules():
        try:
            embeddings.add(module.get_input_embeddings())  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            continue
    for embedding in embeddings:
        if isinstance(embedding, nn.Module) and not _is_open(model, embedding):
            embedding.register_forward_hook(partial(_require_gradient, model))


def _is_open(model: nn.Module, embedding: nn.Module) -> bool:
    """Whether that is done already: a method that chooses again attaches several times."""
    hooks = [hook for hook in embedding._forward_hooks.values() if isinstance(hook, partial)]
    return any(hook.func is _require_gradient and hook.args[0] is model for hook in hooks)


def _require_gradient(model: nn.Module, embedding: nn.Module, args: Any, output: Any) -> None:
    if not torch.is_grad_enabled() or not isinstance(output, Tensor) or output.requires_grad:
        return
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        output.requires_grad_(True)
