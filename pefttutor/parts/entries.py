"""What all selection methods share: train chosen tensors, or chosen entries of tensors, and nothing else.

Chosen entries of a tensor `layer.weight` become a parameter `layer.weight_values` (k), next to a buffer
`layer.weight_index` (k) with their flat places. The weight itself is frozen; before each call of the layer the
values are written into it, and in training the layer sees it through `selected`, which delivers the gradient of the
chosen entries only. So any optimizer keeps state for k values, clipping sees k gradients, and k values are saved.

Only a call of the layer itself delivers a gradient: `h @ model.emb.weight.T` in a model's own forward reads the
weight past it, and that use trains nothing. Where it is known (`shadow.check_called`), attaching is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor import method as base
from pefttutor.kernels.sparse_adamw import read, selected, write
from pefttutor.parts.fingerprint import describe_base
from pefttutor.parts.places import places
from pefttutor.parts.ranking import check_fraction, largest, largest_share, without_values
from pefttutor.parts.shadow import check_called, owners, shadow, unshadow

__all__ = [
    "candidates",
    "check_fraction",
    "entries",
    "largest",
    "largest_share",
    "masks",
    "train_entries",
    "train_tensors",
]

VALUES, INDEX = "_values", "_index"


def train_tensors(
    model: nn.Module, method: Any, names: Iterable[str], modules_to_save: Collection[str] = ()
) -> nn.Module:
    """Freeze `model` but for the parameters called `names` and the whole of `modules_to_save`, and mark it."""
    base.refuse_adapted(model)
    whole, buffers = _fully_trained(model, modules_to_save)
    names = {*names, *whole}
    if not names:
        raise ValueError(f"{type(method).__name__}: nothing is chosen, so nothing would train.")
    base.freeze(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return base.mark(model, method, buffers=buffers)


def train_entries(
    model: nn.Module,
    method: Any,
    chosen: Mapping[str, Tensor],
    modules_to_save: Collection[str] = (),
    *,
    described: dict[str, Any] | None = None,
) -> nn.Module:
    """Freeze `model` but for the entries that the masks or indices in `chosen` name, and `modules_to_save`.

    described: `describe_base` of the base, where the model has left it already.

    Raises: RuntimeError if it is adapted already; ValueError for a mask of another model or shape, an empty one, or
        a weight that is read without calling its layer. Nothing has been changed then.
    """
    base.refuse_adapted(model)
    parameters = dict(model.named_parameters())
    whole, buffers = _fully_trained(model, modules_to_save)
    indices = {name: places(parameters, name, mask) for name, mask in chosen.items() if name not in whole}
    indices = {name: index for name, index in indices.items() if len(index)}
    check_called(model, indices)
    if not indices:
        raise ValueError(f"{type(method).__name__}: no entry is chosen in any of {len(chosen)} masks.")
    if not without_values(parameters):  # such a model can't be saved
        described = described or describe_base(model, without=whole)
    base.freeze(model)
    for name in whole:
        parameters[name].requires_grad_(True)
    for name, index in indices.items():
        _split(model, parameters[name], index)
    kept = [name + INDEX for name in entries(model)]
    return base.mark(model, method, buffers=[*kept, *buffers], described=described)


def entries(model: nn.Module) -> dict[str, Tensor]:
    """The flat places of the entries that train, by the name of their tensor, a tied one once. Shapes: (k)."""
    found: dict[str, Tensor] = {}
    prefixes = {layer: prefix for prefix, layer in model.named_modules()}
    for layer, key in _split_layers(model):
        index = layer.get_buffer(key + INDEX)
        if not any(index is other for other in found.values()):
            found[f"{prefixes[layer]}.{key}".lstrip(".")] = index
    return found


def masks(model: nn.Module) -> dict[str, Tensor]:
    """What trains, as one boolean mask for each parameter of the base: true where an entry is trained."""
    chosen, found = entries(model), {}
    for name, parameter in model.named_parameters():
        if name.removesuffix(VALUES) in chosen and name not in chosen:
            continue
        mask = torch.full(parameter.shape, parameter.requires_grad, dtype=torch.bool)
        if name in chosen:
            mask.view(-1)[chosen[name].long().cpu()] = True
        found[name] = mask
    return found


def candidates(model: nn.Module, modules_to_save: Collection[str] = ()) -> dict[str, Tensor]:
    """The parameters among whose entries a method may choose: all but those of `modules_to_save`."""
    whole, _ = _fully_trained(model, modules_to_save)
    return {n: p for n, p in model.named_parameters() if n not in whole and p.is_floating_point()}


# ---- hooks that every method with chosen entries has: `after_step = entries.after_step`


def after_step(self: Any, model: nn.Module, step: int) -> None:
    """The optimizer has changed the values: put them into the weights."""
    _write_all(model)


def loaded(self: Any, model: nn.Module) -> None:
    """The saved values are in place: put them into the weights."""
    _write_all(model)


def restore(self: Any, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Attach with the choice that was saved in `tensors`, in place of a new one."""
    names = [name.removesuffix(VALUES) for name in tensors if name.endswith(VALUES)]
    chosen = {name: tensors[name + INDEX] for name in names if name + INDEX in tensors}
    if not chosen:  # saved before there was a choice, as LT-SFT in its first phase
        return self.attach(model)
    return train_entries(model, self, chosen, self.modules_to_save)


# ---- one layer


def _split(model: nn.Module, weight: Tensor, index: Tensor) -> None:
    """Give every layer that owns `weight` the chosen entries, the same ones where it is tied."""
    values = nn.Parameter(read(weight, index))
    for layer, key in owners(model, weight):
        layer.register_parameter(key + VALUES, values)
        layer.register_buffer(key + INDEX, index)
        shadow(layer, key, _with_values)


def _with_values(layer: nn.Module, key: str) -> Tensor | None:
    """Before a layer's forward: the weight holds the values, and its gradient goes to them."""
    weight, values, index = layer._parameters[key], *_pair(layer, key)
    assert weight is not None
    if values.requires_grad:
        write(weight, index, values)
    return selected(values, weight, index) if values.requires_grad and torch.is_grad_enabled() else None


def release(model: nn.Module) -> nn.Module:
    """Take the chosen entries' bookkeeping off the model; the weights stay as they have become."""
    _write_all(model)
    for layer, key in list(_split_layers(model)):
        unshadow(layer, key)
        del layer._parameters[key + VALUES]
        del layer._buffers[key + INDEX]
    base.unmark(model)
    return model


def _split_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for layer in model.modules():
        for key, make in vars(layer).get("_shadows", {}).items():
            if make is _with_values:
                yield layer, key


def _pair(layer: nn.Module, key: str) -> tuple[Tensor, Tensor]:
    return layer.get_parameter(key + VALUES), layer.get_buffer(key + INDEX)


def _write_all(model: nn.Module) -> None:
    for layer, key in _split_layers(model):
        values, index = _pair(layer, key)
        write(layer.get_parameter(key), index, values)


def _fully_trained(model: nn.Module, names: Collection[str]) -> tuple[list[str], list[str]]:
    """Names of the parameters, and of the buffers to save, of the modules that train as a whole."""
    if isinstance(names, str):
        raise ValueError(f"modules_to_save is a string; write ({names!r},).")
    modules = set(base.find_modules(model, names, field="modules_to_save").values()) if names else set()
    inside = {p for m in modules for p in m.parameters() if p.is_floating_point()}
    parameters = [name for name, p in model.named_parameters() if p in inside]
    kept = {b for m in modules for b in m.buffers()}
    return parameters, [name for name, b in model.named_buffers() if b in kept and name in model.state_dict()]
