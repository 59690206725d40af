"""Parameters and buffers that a method puts beside the base's own, in whatever modules it likes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pefttutor.parts.attachment import added_key
from pefttutor.parts.part import Key, Part, hold, let_go

__all__ = ["NO_STEP", "Added", "Shared", "step_counter", "steps_of"]

NO_STEP = (  # why a method has counted none
    "after_step was never called: train with pefttutor.fit, or with callbacks=[pefttutor.callback()] in a Trainer"
)


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


class Shared(Added):
    """Tensors that lie in the model once, for changes of many layers; each asks for them by their keys.

    Shapes: any. Cost: the tensors themselves; a layer on another device gets a copy in each call.
    """

    def __init__(
        self, model: nn.Module, name: str, tensors: Mapping[str, Tensor], *, stored: bool = True
    ) -> None:
        """`name`: the attachment's. `tensors`: by their keys, parameters and buffers."""
        super().__init__([(model, "", added_key(key, name), t) for key, t in tensors.items()], stored=stored)
        self.keys = dict(zip(tensors, self.places.values(), strict=True))

    def get(self, *keys: str, device: torch.device) -> list[Tensor]:
        """The tensors of these keys, on the device of the layer that asks."""
        return [getattr(module, key).to(device) for module, key in map(self.keys.__getitem__, keys)]


def step_counter(model: nn.Module, key: str, name: str) -> Added:
    """A number in the model, 0 at first, in which a method counts its steps across calls of `fit`."""
    counter = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)
    return Added([(model, "", added_key(key, name), counter)])


def steps_of(model: nn.Module, key: str, name: str) -> Tensor:
    """That number, to be read and counted on in place."""
    return model.get_buffer(added_key(key, name))
