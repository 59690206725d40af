"""Chosen entries of a weight: they alone train, have optimizer state and are saved.

The k chosen entries of a tensor `layer.weight` become a parameter `layer.weight_values` (k), next to a buffer
`layer.weight_index` (k) with their flat places. The weight itself is frozen; before each call of the layer the
values are written into it, and in training the layer sees it through `selected`, which delivers the gradient of the
chosen entries only. So any optimizer keeps state for k values, clipping sees k gradients, and k values are saved.

Only a call of the layer itself delivers a gradient: `h @ model.emb.weight.T` in a model's own forward reads the
weight past it, and that use trains nothing. Where it is known (`called.check_called`), attaching is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.kernels.flat_entries import read, selected, write
from pefttutor.parts.attachment import DEFAULT, Attachment, added_key, attaching, attachments
from pefttutor.parts.called import check_called
from pefttutor.parts.freezing import InPlace, aside, fully_trained, train_fully, whole
from pefttutor.parts.part import Key, owners
from pefttutor.parts.places import places
from pefttutor.parts.shadow import hush, shadow, unshadow

__all__ = [
    "INDEX",
    "VALUES",
    "Entries",
    "Settled",
    "candidates",
    "choose",
    "entries",
    "masks",
    "saved_choice",
    "train_entries",
]

VALUES, INDEX = "_values", "_index"


def train_entries(
    model: nn.Module,
    method: Any,
    chosen: Mapping[str, Tensor],
    modules_to_save: Collection[str] = (),
    *,
    name: str = DEFAULT,
) -> nn.Module:
    """Freeze `model` but for the entries that the masks or indices in `chosen` name, and `modules_to_save`.

    Raises: ValueError for a name in use, a mask of another model or shape, an empty one, or a weight that is read
        without calling its layer. Nothing has been changed then.
    """
    with attaching(model, method, name) as new:
        choose(model, new, chosen, modules_to_save)
    return model


def choose(
    model: nn.Module,
    attachment: Attachment,
    chosen: Mapping[str, Tensor],
    modules_to_save: Collection[str] = (),
) -> None:
    """Add to an attachment the entries that `chosen` names, and what trains fully beside them."""
    parameters = dict(model.named_parameters())
    fully = fully_trained(model, modules_to_save)[0]
    indices = {n: places(parameters, n, mask) for n, mask in chosen.items() if n not in fully}
    indices = {n: index for n, index in indices.items() if len(index)}
    check_called(model, indices)
    if not indices:
        method = type(attachment.method).__name__
        raise ValueError(f"{method}: no entry is chosen in any of {len(chosen)} masks.")
    for weight_name, index in indices.items():
        attachment.add(Entries(model, weight_name, attachment.name, index))
    for part in train_fully(model, (), modules_to_save):
        attachment.add(part)


def candidates(model: nn.Module, modules_to_save: Collection[str] = ()) -> dict[str, Tensor]:
    """The parameters among whose entries a method may choose: what trains in the base, without `modules_to_save`."""
    fully = fully_trained(model, modules_to_save)[0]
    parameters = dict(model.named_parameters())
    return {name: parameters[name] for name in whole(model) if name not in fully}


def saved_choice(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries that saved tensors say were chosen, by the name of the weight; empty if they say nothing."""
    names = [name.removesuffix(VALUES) for name in tensors if name.endswith(VALUES)]
    return {name: tensors[name + INDEX] for name in names if name + INDEX in tensors}


@dataclass(frozen=True)
class _WithValues:
    """In the weight's place: the weight, which holds the values, and whose gradient goes to them."""

    values: str
    index: str

    def __call__(self, layer: nn.Module, key: str, weight: Tensor) -> Tensor | None:
        values, index = layer.get_parameter(self.values), layer.get_buffer(self.index)
        if values.requires_grad:
            write(weight, index, values)
        return selected(values, weight, index) if values.requires_grad and torch.is_grad_enabled() else None


class Settled(InPlace):
    """Entries that an attachment has trained before it chose others: they stay as they became, and can be put back."""

    def __init__(self, weight_name: str, holders: list[Key], index: Tensor, start: list[Tensor]) -> None:
        super().__init__()
        self.weight_name, self.owners, self.chosen, self.start = weight_name, holders, index, start

    @property
    def weight(self) -> nn.Parameter:
        layer, key = self.owners[0]
        return layer.get_parameter(key)

    @property
    def index(self) -> Tensor:
        return self.chosen.to(self.weight.device)

    def trained(self) -> list[nn.Parameter]:
        return []

    def saved(self) -> list[tuple[str, Tensor]]:
        return []

    def named_in_place(self) -> list[tuple[str, Tensor]]:
        return [(self.weight_name, self.weight)]

    def _read(self) -> list[Tensor]:
        return [read(self.weight, self.index)]

    def _write(self, values: list[Tensor]) -> None:
        write(self.weight, self.index, values[0].to(self.weight.device))


class Entries(Settled):
    """The chosen entries of one weight, the same ones in every layer that it is tied to.

    Shapes: index and values (k). Cost: for k entries 4·k bytes of index and 4·k of values, and 4·k in main memory for
    what they were.
    """

    def __init__(self, model: nn.Module, weight_name: str, name: str, index: Tensor) -> None:
        weight = model.get_parameter(weight_name)
        super().__init__(weight_name, owners(model, weight), index, aside([read(weight, index)]))
        self.name = name
        values = nn.Parameter(read(weight, index))
        for layer, key in self.owners:
            layer.register_parameter(added_key(key + VALUES, name), values)
            layer.register_buffer(added_key(key + INDEX, name), index)
        self._show()

    @property
    def values(self) -> nn.Parameter:
        layer, key = self.owners[0]
        return layer.get_parameter(added_key(key + VALUES, self.name))

    @property
    def index(self) -> Tensor:
        layer, key = self.owners[0]
        return layer.get_buffer(added_key(key + INDEX, self.name))

    def shades(self, module: nn.Module) -> bool:
        return self.values.requires_grad and any(layer is module for layer, _ in self.owners)

    def trained(self) -> list[nn.Parameter]:
        return [self.values]

    def saved(self) -> list[tuple[str, Tensor]]:
        return [(self.weight_name + VALUES, self.values), (self.weight_name + INDEX, self.index)]

    def added(self) -> list[Tensor]:
        return [self.values, self.index]

    def _show(self) -> None:
        for layer, key in self.owners:
            make = _WithValues(added_key(key + VALUES, self.name), added_key(key + INDEX, self.name))
            shadow(layer, key, self.name, make, first=True)

    def switch(self, on: bool) -> None:
        self._hush(on=on)
        if on:
            write(self.weight, self.index, self.values)
        else:
            self._write(self.start)

    def fold(self) -> None:
        self.after_step()
        self._hush(on=False)

    def unfold(self) -> None:
        self._hush(on=True)

    def _hush(self, *, on: bool) -> None:
        for layer, key in self.owners:
            hush(layer, key, self.name, on=on)

    def after_step(self) -> None:
        write(self.weight, self.index, self.values)

    loaded = after_step

    def settle(self) -> Settled:
        """Take the values out and leave the weight as it has become."""
        self.fold()
        self.remove()
        return Settled(self.weight_name, self.owners, self.chosen, self.start)

    def remove(self) -> None:
        for layer, key in self.owners:
            unshadow(layer, key, self.name)
            layer._parameters.pop(added_key(key + VALUES, self.name), None)
            layer._buffers.pop(added_key(key + INDEX, self.name), None)


def _chosen(model: nn.Module) -> Iterator[Entries]:
    carried = attachments(model)
    for attachment in carried.by_name.values() if carried else ():
        yield from (part for part in attachment.parts if isinstance(part, Entries))


def entries(model: nn.Module) -> dict[str, Tensor]:
    """The flat places of the entries that train, by the name of their weight, a tied one once. Shapes: (k).

    >>> from pefttutor import SparseFineTuning
    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
    >>> model = SparseFineTuning().attach(model, {"0.weight": torch.eye(2).bool()})
    >>> entries(model)["0.weight"].tolist()
    [0, 3]
    """
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(part.weight)]: part.index for part in _chosen(model)}


def masks(model: nn.Module) -> dict[str, Tensor]:
    """What trains, as one boolean mask for each parameter of the base: true where an entry is trained."""
    chosen, found = entries(model), {}
    ours = {id(part.values) for part in _chosen(model)}
    for name, parameter in model.named_parameters():
        if id(parameter) in ours:
            continue
        mask = torch.full(parameter.shape, parameter.requires_grad, dtype=torch.bool)
        if name in chosen:
            mask.view(-1)[chosen[name].long().cpu()] = True
        found[name] = mask
    return found
