"""Change what single layers compute, without replacing them: the layer stays the same object, of a wider class.

    y = f(x)   becomes   y = change(f, x)          several changes: each around those before it

Names, hooks, tied weights and references to the layer stay as they were, and taking the last change out gives the
layer its own class back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.parts.linear import dense_weight, is_plain, stored_as, why_not_linear
from pefttutor.parts.part import Part, hold, let_go

__all__ = ["AdaptedLayer", "LayerChange"]

Compute = Callable[..., Tensor]


class AdaptedLayer(nn.Module):
    """What a layer's class is widened by: its forward goes through the changes that act on it."""

    _adapted = True  # for `linear`, which looks for the class of before

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        compute = super().forward
        own = True  # whether `compute` is still the layer's own formula
        for change in vars(self)["_changes"].values():
            if change.acts:
                change.called = True
                compute, own = partial(change.forward, compute, own), False
            elif change.folded:
                change.check_untrained()
        return compute(*args, **kwargs)

    def extra_repr(self) -> str:
        own = super().extra_repr()
        return ", ".join([own, *(change.describe() for change in vars(self)["_changes"].values())])

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind = type(self).__mro__[2]  # the class is made here, so pickle can't find it by name
        return _blank, (kind,), vars(self)


_made_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _widened(kind: type[nn.Module]) -> type[nn.Module]:
    """The one class that widens `kind`."""
    if kind not in _made_classes:
        _made_classes[kind] = type(f"Adapted{kind.__name__}", (AdaptedLayer, kind), {"_adapted": True})
    return _made_classes[kind]


def _blank(kind: type[nn.Module]) -> nn.Module:
    widened = _widened(kind)
    return widened.__new__(widened)


class LayerChange(Part):
    """One attachment's change of one layer, with the parameters and buffers that it adds to it.

    A kind of change says `forward` and, where a weight can hold it, `folded_into`.
    """

    # Whether it adds to what the layer reads, for whatever else the layer does with it: then it acts before all others,
    # whenever it was attached, and no other one builds on it.
    on_what_is_read = False

    def __init__(self, path: str, layer: nn.Module, name: str, added: Mapping[str, Tensor]) -> None:
        """`path`: the layer's name in the model. `name`: the attachment's. `added`: by their keys in the layer."""
        self.path, self.layer, self.name, self.added_keys = path, layer, name, tuple(added)
        self.on, self.folded, self.plain = True, False, is_plain(layer)
        before = next(iter(vars(layer).get("_changes", {}).values()), None)  # then it can't be asked any more
        self.odd: str | None = before.odd if before else why_not_linear(layer)
        # Whether the model has called the layer since; some read its weight in another way.
        self.called = False
        if not isinstance(layer, AdaptedLayer):
            vars(layer)["_changes"] = {}
            layer.__class__ = _widened(type(layer))
        for key, tensor in added.items():
            hold(layer, key, tensor)
        changes = [*vars(layer)["_changes"].values(), self]  # each is around those before it
        vars(layer)["_changes"] = {c.name: c for c in sorted(changes, key=lambda c: c.on_what_is_read)}

    # ---- what a kind of change says

    def forward(self, inner: Compute, own: bool, *args: Any, **kwargs: Any) -> Tensor:
        """The changed output. `inner` computes what the layer gives without this change; `own`: by its own formula."""
        raise NotImplementedError

    def folded_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight (out, in) and the bias that do the same without this change, computed as wide as they come."""
        raise NotImplementedError

    def describe(self) -> str:
        """A few words for the layer's repr."""
        return self.name

    # ---- what every part knows

    @property
    def acts(self) -> bool:
        return self.on and not self.folded

    @property
    def learns(self) -> bool:
        return self.acts and any(p.requires_grad for p in self.trained())

    def beneath(self) -> tuple[Tensor, Tensor | None]:
        """The weight (out, in) and bias that this change builds on: the layer's, with what others make of them before.

        Raises: ValueError for a layer that can't tell its weight.
        """
        layer: Any = self.layer
        base = vars(layer)["_base"] if self.folded else {}
        weight = stored_as(layer, base["weight"]) if base else dense_weight(layer)
        bias = base.get("bias") if base else getattr(layer, "bias", None)
        changes = list(vars(layer)["_changes"].values())
        before = [c for c in changes[: changes.index(self)] if c.acts or (base and c.folded)]
        for change in before:
            wide = torch.promote_types(weight.dtype, torch.float32)
            weight, bias = change.folded_into(weight.to(wide), None if bias is None else bias.to(wide))
        return weight, bias

    def check_untrained(self) -> None:
        """Raise RuntimeError if a training step would not see the parameters, because they are folded in."""
        if self.layer.training and torch.is_grad_enabled() and any(p.requires_grad for p in self.trained()):
            keys = [key for key in self.added_keys if key in self.layer._parameters]
            raise RuntimeError(
                f"this model is merged, so {' and '.join(keys)} would learn nothing: unmerge it, then train."
            )

    def trained(self) -> list[nn.Parameter]:
        return [self.layer.get_parameter(key) for key in self.added_keys if key in self.layer._parameters]

    def saved(self) -> list[tuple[str, Tensor]]:
        return [(f"{self.path}.{key}".lstrip("."), getattr(self.layer, key)) for key in self.added_keys]

    def switch(self, on: bool) -> None:
        self.on = on

    def remove(self) -> None:
        changes = vars(self.layer)["_changes"]
        changes.pop(self.name)
        for key in self.added_keys:
            let_go(self.layer, key)
        if not changes:
            del vars(self.layer)["_changes"]
            self.layer.__class__ = type(self.layer).__mro__[2]

    def covers(self, module: nn.Module) -> bool:
        return module is self.layer and self.acts

    def touched(self) -> list[Tensor]:
        tensors = (self.layer._parameters.get("weight"), self.layer._parameters.get("bias"))
        return [tensor for tensor in tensors if tensor is not None]

    # ---- folding

    def check_foldable(self) -> None:
        weight = self.layer._parameters.get("weight")
        if weight is None or not weight.is_floating_point():
            raise ValueError(
                f"{self.path!r} keeps its weight in a form that nothing can be added to (is it quantised?); leave the "
                "method attached, or attach it to the model as it was before quantising."
            )
        if self.odd:
            raise ValueError(f"{self.path!r} can't take it: {self.odd}.")

    def fold(self) -> None:
        self.check_foldable()
        self.folded = True
        _refold(self.layer)

    def unfold(self) -> None:
        self.folded = False
        _refold(self.layer)

    def keep(self, model: nn.Module) -> None:
        base = vars(self.layer)["_base"]
        for key, value in _made(base, [self]).items():
            before = base[key]
            if before is None:
                base[key] = _like(base["weight"], value)
            elif _held_elsewhere(model, before, self.layer):
                # Tied: the others go on with the weight of before.
                base[key] = _like(before, value)
                _untie(model)
            else:
                before.data = value.to(before.dtype)
        self.on = self.folded = False
        _refold(self.layer)


def _refold(layer: Any) -> None:
    """Let weight and bias hold what the folded changes make of the base's; without any, be the very base's again."""
    own = {key: layer._parameters[key] for key in ("weight", "bias") if key in layer._parameters}
    base = vars(layer).setdefault("_base", own)
    for parameter in [parameter for parameter in base.values() if parameter is not None]:
        parameter.data = parameter.data.to(layer.weight)  # the model may have moved meanwhile
    layer._parameters.update(base)
    folded = [change for change in vars(layer)["_changes"].values() if change.folded]
    if not folded:
        del vars(layer)["_base"]
        return
    for key, value in _made(base, folded).items():
        before = base[key] if base[key] is not None else base["weight"]
        layer._parameters[key] = _like(before, value)


@torch.no_grad()
def _made(base: Mapping[str, Any], changes: Sequence[LayerChange]) -> dict[str, Tensor]:
    """What the changes make of weight and bias, in float32 at least and the layer's own order; unchanged: left out."""
    layer = changes[0].layer
    wide = torch.promote_types(base["weight"].dtype, torch.float32)
    weight = stored_as(layer, base["weight"].to(wide))
    bias = before = base["bias"].to(wide) if base.get("bias") is not None else None
    for change in changes:
        weight, bias = change.folded_into(weight, bias)
    made = {"weight": stored_as(layer, weight)}
    return made if bias is before or bias is None else made | {"bias": bias}


def _held_elsewhere(model: nn.Module, parameter: nn.Parameter, layer: nn.Module) -> bool:
    """Whether another layer holds the parameter, or has it as its base while something is folded in there."""
    others = [module for module in model.modules() if module is not layer]
    held = [
        p
        for module in others
        for p in (*module._parameters.values(), *vars(module).get("_base", {}).values())
    ]
    return any(p is parameter for p in held)


def _like(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    """The value as a parameter, rounded once, to the dtype of the one before."""
    return nn.Parameter(value.to(parameter.dtype).contiguous(), requires_grad=parameter.requires_grad)


def _untie(model: Any) -> None:
    """The weight is no longer that of the layer it was tied to; transformers would tie them again when loading."""
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        model.config.tie_word_embeddings = False
