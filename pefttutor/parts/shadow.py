"""Let a layer compute with another tensor in a parameter's place, without touching the layer's code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.parts.part import Key, Part, owners

__all__ = ["Shadowed", "hush", "shadow", "unshadow"]

# make(layer, key, weight) → what the layer computes with, or None for the weight as it is
Make = Callable[[nn.Module, str, Tensor], Tensor | None]


def shadow(layer: nn.Module, key: str, name: str, make: Make, *, first: bool = False) -> None:
    """From now on `layer.key` is, during each forward, what `make(layer, key, weight)` returns (None: the weight).

    The parameter stays where it is. It works for every layer that reads `self.key` in its forward, since Python looks
    at an object's own attributes before a module's parameters; what several attachments make is made one from the
    other. `make` must be a function of a module, or an object that holds no layer: a copied model is then free of
    the original. `name` is the attachment's; `first` puts it before the others.
    """
    others = shadows(layer).get(key, {})
    chain = {name: make, **others} if first else {**others, name: make}
    vars(layer).setdefault("_shadows", {})[key] = chain  # a new one: see `restored_on_error`
    if _show not in layer._forward_pre_hooks.values():
        # Before other hooks: torch's weight_norm makes its weight in a hook, from tensors that may be shadowed.
        layer.register_forward_pre_hook(_show, prepend=True)
        layer.register_forward_hook(_hide, always_call=True)


def unshadow(layer: nn.Module, key: str, name: str) -> None:
    """Take the attachment's tensor away again; the last one takes the hooks along."""
    hush(layer, key, name, on=True)
    chain = {other: make for other, make in shadows(layer)[key].items() if other != name}
    if chain:
        vars(layer)["_shadows"][key] = chain
        return
    del vars(layer)["_shadows"][key]
    if vars(layer)["_shadows"]:
        return
    del vars(layer)["_shadows"]
    for hooks, ours in ((layer._forward_pre_hooks, _show), (layer._forward_hooks, _hide)):
        for handle in [handle for handle, hook in hooks.items() if hook is ours]:
            del hooks[handle]
            layer._forward_hooks_always_called.pop(handle, None)


def hush(layer: nn.Module, key: str, name: str, *, on: bool) -> None:
    """Let the attachment's tensor stand in the parameter's place again (on), or not; its turn among others stays."""
    hushed = vars(layer).get("_hushed", frozenset())
    hushed = hushed - {(key, name)} if on else hushed | {(key, name)}
    vars(layer).pop("_hushed", None)
    if hushed:
        vars(layer)["_hushed"] = hushed


def shadows(layer: nn.Module) -> Mapping[str, Mapping[str, Make]]:
    """What stands in the place of the layer's parameters, by their key and the attachment's name."""
    return vars(layer).get("_shadows", {})


class Shadowed(Part):
    """A weight that its layers see through a function of new parameters: a mask, or a gated difference.

    Shapes: the new parameters as given, the result the weight's. Cost: the result, made at every call of a layer.
    """

    def __init__(
        self, model: nn.Module, weight_name: str, name: str, make: Make, added: Mapping[str, nn.Parameter]
    ) -> None:
        """`added`: by the key under which each owner of the weight holds it."""
        self.weight_name, self.name, self.make, self.added_keys = weight_name, name, make, tuple(added)
        self.owners: list[Key] = owners(model, model.get_parameter(weight_name))
        self.base: nn.Parameter | None = None  # the weight without the change, while folded
        for layer, key in self.owners:
            for added_name, parameter in added.items():
                layer.register_parameter(added_name, parameter)
            shadow(layer, key, name, make)

    @property
    def weight(self) -> Tensor:
        layer, key = self.owners[0]
        return layer.get_parameter(key)

    def trained(self) -> list[nn.Parameter]:
        layer, _ = self.owners[0]
        return [layer.get_parameter(added) for added in self.added_keys]

    def saved(self) -> list[tuple[str, Tensor]]:
        layer, _ = self.owners[0]
        path = self.weight_name.rpartition(".")[0]
        return [(f"{path}.{added}".lstrip("."), layer.get_parameter(added)) for added in self.added_keys]

    def switch(self, on: bool) -> None:
        for layer, key in self.owners:
            hush(layer, key, self.name, on=on)

    def shades(self, module: nn.Module) -> bool:
        hushed = vars(module).get("_hushed", ())
        return any(layer is module and (key, self.name) not in hushed for layer, key in self.owners)

    def touched(self) -> list[Tensor]:
        return [self.weight]

    def check_foldable(self) -> None:
        """A weight can hold its own mask, or difference."""

    def fold(self) -> None:
        layer, key = self.owners[0]
        self.switch(False)
        weight = layer.get_parameter(key)
        mode = layer.training
        with torch.no_grad():
            layer.training = False  # gates are at their usual value
            made = self.make(layer, key, weight)
            layer.training = mode
        assert made is not None
        self.base, folded = nn.Parameter(weight.detach(), weight.requires_grad), made.detach().clone()
        self.base.data, weight.data = weight.data, folded  # the same parameter in all its places

    def unfold(self) -> None:
        assert self.base is not None
        weight = self.weight
        weight.data, self.base = self.base.data.to(weight), None
        self.switch(True)

    def keep(self, model: nn.Module) -> None:
        self.base = None

    def remove(self) -> None:
        for layer, key in self.owners:
            unshadow(layer, key, self.name)
            for added in self.added_keys:
                layer._parameters.pop(added, None)


def _show(layer: nn.Module, args: Any) -> None:
    hushed = vars(layer).get("_hushed", ())
    for key, chain in shadows(layer).items():
        weight = now = layer._parameters[key]
        assert weight is not None
        for make in [make for name, make in chain.items() if (key, name) not in hushed]:
            made = make(layer, key, now)  # type: ignore[arg-type]
            now = now if made is None else made  # type: ignore[assignment]
        if now is not weight:
            vars(layer)[key] = now


def _hide(layer: nn.Module, args: Any, output: Any) -> None:
    for key in shadows(layer):
        vars(layer).pop(key, None)
