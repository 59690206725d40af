"""Parameters and buffers that a method puts beside the base's own, in whatever modules it likes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pefttutor.parts.attachment import added_key
from pefttutor.parts.part import Key, Part, hold, let_go

__all__ = ["Added", "step_counter"]


class Added(Part):
    """New tensors in modules: nothing of the base changes. What makes use of them asks `on` (see `streams`).

    Shapes: any. Cost: the tensors themselves.
    """

    def __init__(self, tensors: Iterable[tuple[nn.Module, str, str, Tensor]], *, stored: bool = True) -> None:
        """`tensors`: for each the module, its name in the model, the key it gets there, and a parameter or buffer.
        `stored`: whether adapter files hold them; buffers that can be made again need not be.
        """
        self.on, self.stored = True, stored
        self.places: dict[str, Key] = {}
        for module, path, key, tensor in tensors:
            hold(module, key, tensor, persistent=stored)
            self.places[f"{path}.{key}".lstrip(".")] = module, key

    def trained(self) -> list[nn.Parameter]:
        return [tensor for _, tensor in self.saved() if isinstance(tensor, nn.Parameter)]

    def saved(self) -> list[tuple[str, Tensor]]:
        places = self.places.items() if self.stored else ()
        return [(name, getattr(module, key)) for name, (module, key) in places]

    def added(self) -> list[Tensor]:
        return [getattr(module, key) for module, key in self.places.values()]

    def check_foldable(self) -> None:
        """By themselves they change nothing; what makes use of them may say no."""

    def switch(self, on: bool) -> None:
        self.on = on

    def remove(self) -> None:
        for module, key in self.places.values():
            let_go(module, key)


def step_counter(model: nn.Module, key: str, name: str) -> Added:
    """A number in the model, 0 at first, in which a method counts its steps across calls of `fit`."""
    counter = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)
    return Added([(model, "", added_key(key, name), counter)])
