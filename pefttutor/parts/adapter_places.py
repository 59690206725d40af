"""Which layers adapters stand at: those that are named, or those that a trial shows to end the sublayers; and how they
come there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from pefttutor.parts.attachment import Attachment
from pefttutor.parts.bottleneck import Bottleneck, Noted, draw_projections, width_of
from pefttutor.parts.linear import why_not_linear
from pefttutor.parts.modules import linear_targets
from pefttutor.parts.norms import is_norm
from pefttutor.parts.streams import Hooked
from pefttutor.parts.sublayers import sublayers

__all__ = [
    "Places",
    "adapter_places",
    "add_bottlenecks",
    "check_beside",
    "check_narrow",
    "parallel_places",
    "sublayer_ends",
]

# The adapted layers by name, each with the name of the layer whose input is read, None for its own output.
Places = Mapping[str, tuple[nn.Module, str | None]]


def sublayer_ends(model: nn.Module, placement: str, field: str = "target_modules") -> dict[str, str]:
    """The layers that end the sublayers, each with the one that reads its sublayer's input.

    placement: "houlsby" for every sublayer; anything else means each block's last one alone, the feed-forward.
    field: as for `sublayers`.

    Raises: ValueError as `sublayers`.
    """
    return {s.end: s.start for s in sublayers(model, field) if s.last or placement == "houlsby"}


def adapter_places(
    model: nn.Module,
    placement: str,
    target_modules: str | Collection[str] | None,
    modules_to_save: Collection[str] = (),
    *,
    field: str = "target_modules",
) -> dict[str, nn.Module]:
    """The layers after which adapters stand, by name; without `target_modules` those that the placement means.

    A norm may be named as well as a linear layer.

    Raises: ValueError for a name that finds nothing, a layer that can't be adapted, or sublayers that aren't found.
    """
    named = tuple(sublayer_ends(model, placement, field)) if target_modules is None else target_modules
    return linear_targets(model, named, modules_to_save, why_not=_why_not, field=field)


def parallel_places(
    model: nn.Module,
    target_modules: str | Collection[str] | None,
    input_modules: str | Collection[str] | None,
    modules_to_save: Collection[str] = (),
    *,
    field: str = "target_modules",
) -> dict[str, tuple[nn.Module, str | None]]:
    """The layers beside which adapters stand, with those whose input they read; without names each block's last
    sublayer's, the feed-forward's.

    Raises: ValueError as `adapter_places`, and unless there is one of `input_modules` for each of `target_modules`.
    """
    if target_modules is None:
        ends = sublayer_ends(model, "parallel", field)
        target_modules, input_modules = tuple(ends), tuple(ends.values())
    layers = linear_targets(model, target_modules, modules_to_save, field=field)
    read = list(linear_targets(model, input_modules or (), field="input_modules"))
    if len(read) != len(layers):
        raise ValueError(
            f"{field} finds {len(layers)} layers and input_modules {len(read)}; expected one for each."
        )
    return {path: (layers[path], start) for path, start in zip(layers, read, strict=True)}


def add_bottlenecks(
    new: Attachment,
    model: nn.Module,
    places: Places,
    bottleneck: int,
    generator: torch.Generator,
    **how: Any,
) -> None:
    """Take in a bottleneck adapter at each place. how: what `Bottleneck` asks for, and std for `draw_projections`."""
    std = how.pop("std", None)
    for path, (layer, start) in places.items():
        drawn = draw_projections(width_of(layer), bottleneck, generator, std)
        source = Noted(start) if start else None
        if source is not None:
            new.add(Hooked([(model.get_submodule(source.path), source.note)]))
        new.add(Bottleneck(path, layer, new.name, drawn, source=source, **how))


def check_beside(method: Any) -> None:
    """Raise ValueError unless a method has both of adapter_modules and input_modules, or neither."""
    if (method.adapter_modules is None) != (method.input_modules is None):
        raise ValueError(
            "adapter_modules says beside which layers adapters stand, and input_modules what they read: give both or "
            "neither."
        )


def check_narrow(layers: Mapping[str, nn.Module], bottleneck: int) -> None:
    """Raise ValueError for a layer that gives fewer features than an adapter has in its middle."""
    for path, layer in layers.items():
        if bottleneck > width_of(layer):
            raise ValueError(
                f"bottleneck is {bottleneck}, but {path!r} gives {width_of(layer)} features: it must be at most "
                f"{width_of(layer)}."
            )


def _why_not(layer: nn.Module) -> str | None:
    """Why nothing can be added to what a layer gives, or None."""
    return None if is_norm(layer) and "forward" not in vars(layer) else why_not_linear(layer)
