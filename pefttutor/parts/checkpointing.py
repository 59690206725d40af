"""Let reentrant activation checkpointing see that there is something to train behind frozen embeddings."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["close_to_checkpointing", "open_to_checkpointing"]


def open_to_checkpointing(model: nn.Module) -> None:
    """Make the output of the embeddings require a gradient, but only while checkpointing is on.

    `torch.utils.checkpoint(use_reentrant=True)` gives a block gradients only if one of its inputs requires one. With
    frozen embeddings none does, and the adapters inside would learn nothing. At other times that would cost a
    backward pass below the first adapter.
    """
    for embedding in _embeddings(model):
        if not _hooks(embedding, model):
            embedding.register_forward_hook(partial(_require_gradient, model))


def close_to_checkpointing(model: nn.Module) -> None:
    """Take back what `open_to_checkpointing` has done."""
    for embedding in _embeddings(model):
        for key in _hooks(embedding, model):
            del embedding._forward_hooks[key]


def _embeddings(model: nn.Module) -> set[nn.Module]:
    found = set()
    for module in model.modules():
        try:
            found.add(module.get_input_embeddings())  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            continue
    return {module for module in found if isinstance(module, nn.Module)}


def _hooks(embedding: nn.Module, model: nn.Module) -> list[int]:
    """The hooks that this file has registered for `model`."""
    return [
        key
        for key, hook in embedding._forward_hooks.items()
        if isinstance(hook, partial) and hook.func is _require_gradient and hook.args[0] is model
    ]


def _require_gradient(model: nn.Module, embedding: nn.Module, args: Any, output: Any) -> None:
    if not torch.is_grad_enabled() or not _checkpoints(model):
        return
    for tensor in output if isinstance(output, (tuple, list)) else (output,):  # Swin's returns a tuple
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.requires_grad:
            tensor.requires_grad_(True)


def _checkpoints(model: nn.Module) -> bool:
    """Whether checkpointing is on anywhere. It is asked in every step, so it must cost less than a layer does.

    A module that lacks an attribute raises an error, with a text; its dictionary and its class just say no.
    """
    seen: set[nn.Module] = set()
    left: list[nn.Module | None] = [model]
    while left:
        module = left.pop()
        if module is None or module in seen:
            continue
        if vars(module).get("gradient_checkpointing", getattr(type(module), "gradient_checkpointing", False)):
            return True
        seen.add(module)
        left.extend(module._modules.values())
    return False
