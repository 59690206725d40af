"""Freezing, and the base's own parameters that train as a whole: a new head, the biases, the last blocks."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from pefttutor.parts.modules import find_modules
from pefttutor.parts.part import Key, Part

__all__ = [
    "InPlace",
    "Whole",
    "added_by_others",
    "aside",
    "freeze",
    "fully_trained",
    "train_everything",
    "train_fully",
    "trainable",
    "whole",
]


START = "_start"


def freeze(model: nn.Module) -> nn.Module:
    """Stop training every parameter of `model`, and drop the gradients left from before.

    >>> layer = nn.Linear(2, 2)
    >>> trainable(freeze(layer))
    {}
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return model


def trainable(model: nn.Module) -> dict[str, int]:
    """Name and number of values of every parameter that trains; a shared parameter counts once.

    >>> trainable(nn.Linear(3, 5))
    {'weight': 15, 'bias': 5}
    """
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


def fully_trained(model: nn.Module, modules_to_save: Collection[str]) -> tuple[list[str], list[str]]:
    """The names of the parameters and of the buffers that `modules_to_save` means, each once, in the model's order.

    Buffers that aren't persistent aren't saved by transformers either, so they are left out.

    >>> fully_trained(nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.BatchNorm1d(2)}), ("head",))[0]
    ['head.weight', 'head.bias']

    Raises: ValueError for a string, or a name that finds no module.
    """
    if isinstance(modules_to_save, str):
        raise ValueError(f"modules_to_save is a string; write ({modules_to_save!r},).")
    if not modules_to_save:
        return [], []
    modules = find_modules(model, modules_to_save, field="modules_to_save").values()
    others = added_by_others(model)
    inside = {p for m in modules for p in m.parameters() if p.is_floating_point() and id(p) not in others}
    buffers = {b for m in modules for b in m.buffers() if id(b) not in others}
    persistent = model.state_dict().keys()
    return (
        [name for name, p in model.named_parameters() if p in inside],
        [name for name, b in model.named_buffers() if b in buffers and name in persistent],
    )


def train_fully(model: nn.Module, names: Iterable[str], modules_to_save: Collection[str] = ()) -> list[Part]:
    """The part that trains the parameters called `names` and all of `modules_to_save`; none if that is nothing."""
    parameters, buffers = fully_trained(model, modules_to_save)
    wanted = {*names, *parameters}
    ordered = [name for name, _ in model.named_parameters() if name in wanted]
    return [Whole(model, ordered, buffers)] if ordered else []


def train_everything(model: nn.Module, *, beside: bool = False) -> Whole:
    """The part that trains all that a method may train of the base (see `whole`), with its buffers."""
    base = {id(b) for b in base_buffers(model)}
    persistent = model.state_dict().keys()
    buffers = [name for name, b in model.named_buffers() if name in persistent and id(b) in base]
    return Whole(model, whole(model), buffers, beside=beside)


def base_buffers(model: nn.Module) -> list[Tensor]:
    """The buffers of the base, without those that attachments have added."""
    ours = added_by_others(model)
    return [b for b in model.buffers() if id(b) not in ours]


def added_by_others(model: nn.Module) -> set[int]:
    """The ids of all tensors that attachments have put beside the base's own."""
    from pefttutor.parts.attachment import attachments

    carried = attachments(model)
    parts = [part for a in carried.by_name.values() for part in a.parts] if carried else []
    return {id(tensor) for part in parts for tensor in part.added()}


def whole(model: nn.Module) -> list[str]:
    """The parameters that a method for the entire model may train: those that train in the base as it came.

    What a model declares fixed, as Whisper its sinusoidal positions, stays so. A model in which nothing requires a
    gradient has been frozen by somebody before; then all of floating point are meant.
    """
    from pefttutor.parts.attachment import attachments

    carried = attachments(model)
    tensors = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    trained = carried.trained if carried else {name for name, p in tensors.items() if p.requires_grad}
    ours = added_by_others(model)
    base = {name: p for name, p in tensors.items() if id(p) not in ours}
    return [name for name in base if name in trained] or list(base)


class InPlace(Part):
    """A part that trains some of the base's own tensors where they are, and can put back what they were.

    What they were is kept in main memory, so that a GPU pays nothing for `detach`.

    Cost: one copy of what trains, in main memory.
    """

    def __init__(self) -> None:
        self.learned: list[Tensor] | None = None  # while switched off: what had been learned

    def _read(self) -> list[Tensor]:
        """What the tensors hold at the places that train."""
        raise NotImplementedError

    def _write(self, values: list[Tensor]) -> None:
        raise NotImplementedError

    def switch(self, on: bool) -> None:
        if on and self.learned is not None:
            self._write(self.learned)
            self.learned = None
        elif not on and self.learned is None:
            self.learned = aside(self._read())
            self._write(self._start())

    def _start(self) -> list[Tensor]:
        """What the tensors were."""
        return self.start

    start: list[Tensor]

    def kept_aside(self) -> list[Tensor]:
        return [*getattr(self, "start", ()), *(self.learned or ())]

    def added(self) -> list[Tensor]:
        return []

    def check_foldable(self) -> None:
        """The weights hold the change already."""

    def remove(self) -> None:
        self.learned = None


def aside(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies in main memory; on the meta device there is nothing to copy."""
    return [t.detach().clone() if t.is_meta else t.detach().to("cpu", copy=True) for t in tensors]


class Whole(InPlace):
    """Parameters of the base that train as a whole, with the buffers of their modules.

    Shapes: any. Cost: one copy of them in main memory, for `detach` and `switch`.
    """

    def __init__(
        self, model: nn.Module, names: Iterable[str], buffers: Iterable[str] = (), *, beside: bool = False
    ) -> None:
        """`beside`: what the parameters were is kept beside them, in buffers that aren't saved, for `starts`."""
        super().__init__()
        self.places: dict[str, Key] = {name: _place(model, name) for name in names}
        self.buffers: dict[str, Key] = {name: _place(model, name) for name in buffers}
        self.beside = beside
        if not beside:
            self.start = aside(self._read())
            return
        for module, key in [*self.places.values(), *self.buffers.values()]:
            module.register_buffer(key + START, getattr(module, key).detach().clone(), persistent=False)

    def starts(self) -> dict[str, Tensor]:
        """What the parameters were, by their names, where that is kept beside them."""
        return {name: module.get_buffer(key + START) for name, (module, key) in self.places.items()}

    def trained(self) -> list[nn.Parameter]:
        return [module.get_parameter(key) for module, key in self.places.values()]

    def saved(self) -> list[tuple[str, Tensor]]:
        return [(name, getattr(module, key)) for name, (module, key) in (self.places | self.buffers).items()]

    named_in_place = saved

    def _read(self) -> list[Tensor]:
        return [tensor for _, tensor in self.saved()]

    def _start(self) -> list[Tensor]:
        if not self.beside:
            return self.start
        return [m.get_buffer(key + START) for m, key in (*self.places.values(), *self.buffers.values())]

    def added(self) -> list[Tensor]:
        return self._start() if self.beside else []

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self._read(), values, strict=True):
            tensor.copy_(value)

    def remove(self) -> None:
        super().remove()
        for module, key in [*self.places.values(), *self.buffers.values()] if self.beside else []:
            del module._buffers[key + START]
            module._non_persistent_buffers_set.discard(key + START)


def _place(model: nn.Module, name: str) -> Key:
    """The module that holds the tensor called `name`, and what it calls it."""
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key
