"""Which layers a model really calls: seen in a trial, since a change of a layer that is never called changes nothing.

Mamba reads the weight of its `dt_proj`, and nn.MultiheadAttention that of its `out_proj`, without calling the layer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pefttutor.data.trial import ordinary, trial
from pefttutor.parts.part import owners_of_each

__all__ = ["check_called", "own_tokens", "read_past"]


def check_called(model: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError if one of the parameters called `names` is read without its layer being called.

    Cost: a forward pass of three tokens; a second one, and a backward pass, if a layer wasn't called in it.
    """
    for name in names:
        path = name.rpartition(".")[0]
        kind, own = type(model.get_submodule(path)), path.rpartition(".")[2]
        if kind.__name__ == "NonDynamicallyQuantizableLinear" or own == "rel_embeddings":
            _refuse(name)
    past = read_past(model, [model.get_parameter(name) for name in names])
    for name in names:
        if id(model.get_parameter(name)) in past:
            _refuse(name)


def _refuse(name: str) -> None:
    path = name.rpartition(".")[0]
    raise ValueError(
        f"{name!r} is read without calling its layer {path!r}, so a change of a part of it would not be seen. "
        f"Train all of it with modules_to_save=({path.rpartition('.')[2]!r},), or leave it out."
    )


def read_past(model: nn.Module, weights: Iterable[Tensor]) -> set[int]:
    """The ids of those weights that lead to what the model says although no layer that holds them is called.

    A layer that isn't called because this input doesn't need it, such as an expert, isn't meant: its weight leads to
    nothing. Empty for a model that doesn't read tokens, or has no values: there nothing can be seen.
    """
    weights = list(weights)
    owned = owners_of_each(model, weights)
    holders = {id(w): (w, [module for module, _ in owned[id(w)]]) for w in weights}
    tokens = own_tokens(model)
    if tokens is None:
        return set()
    called: set[nn.Module] = set()
    modules = {module for _, found in holders.values() for module in found}
    handles = [
        module.register_forward_pre_hook(lambda module, args: called.add(module)) for module in modules
    ]
    try:
        with trial(model):
            model(**tokens)
    except Exception:  # whatever a model raises here means: it can't be tried in this way
        return set()
    finally:
        for handle in handles:
            handle.remove()
    silent = [w for w, found in holders.values() if not called.intersection(found) and w.is_floating_point()]
    return _leading_to_the_output(model, silent, tokens) if silent else set()


def _leading_to_the_output(model: nn.Module, weights: list[Tensor], tokens: dict[str, Tensor]) -> set[int]:
    before = [w.requires_grad for w in weights]
    try:
        for w in weights:
            w.requires_grad_(True)
        with trial(model), torch.enable_grad():
            output = model(**tokens)
            said = getattr(output, "logits", None)
            said = output[0] if said is None else said
            if not said.requires_grad:
                return set()
            gradients = torch.autograd.grad(said.float().sum(), weights, allow_unused=True)
        return {id(w) for w, gradient in zip(weights, gradients, strict=True) if gradient is not None}
    except Exception:
        return set()
    finally:
        for w, requires_grad in zip(weights, before, strict=True):
            w.requires_grad_(requires_grad)


def own_tokens(model: nn.Module) -> dict[str, Tensor] | None:
    """Three tokens to try the model with; None if it doesn't read tokens, or has no values."""
    try:
        table = getattr(model.get_input_embeddings(), "weight", None)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    if not isinstance(table, Tensor) or table.is_meta or table.dim() != 2:
        return None
    tokens = torch.tensor([ordinary(model, len(table), 3)], device=table.device)
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens} if both else {})
