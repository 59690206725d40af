"""Which layers adapters stand at: those that are named, or those that a trial shows to end the sublayers."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from pefttutor.parts.bottleneck import width_of
from pefttutor.parts.linear import why_not_linear
from pefttutor.parts.modules import linear_targets
from pefttutor.parts.norms import is_norm
from pefttutor.parts.sublayers import sublayers

__all__ = ["adapter_places", "check_narrow", "sublayer_ends"]


def sublayer_ends(model: nn.Module, placement: str) -> dict[str, str]:
    """The layers that end the sublayers, each with the one that reads its sublayer's input.

    placement: "houlsby" for every sublayer; anything else means each block's last one alone, the feed-forward.

    Raises: ValueError as `sublayers`.
    """
    return {s.end: s.start for s in sublayers(model) if s.last or placement == "houlsby"}


def adapter_places(
    model: nn.Module,
    placement: str,
    target_modules: str | Collection[str] | None,
    modules_to_save: Collection[str] = (),
) -> dict[str, nn.Module]:
    """The layers after which adapters stand, by name; without `target_modules` those that the placement means.

    A norm may be named as well as a linear layer.

    Raises: ValueError for a name that finds nothing, a layer that can't be adapted, or sublayers that aren't found.
    """
    named = tuple(sublayer_ends(model, placement)) if target_modules is None else target_modules
    return linear_targets(model, named, modules_to_save, why_not=_why_not)


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
