"""Any change of linear weights as a LoRA, which every server takes: its best approximation of a chosen rank.

ΔW ≈ B A          B A = U_r S_r V_rᵀ of ΔW = U S Vᵀ;  what is lost is ‖ΔW − B A‖_F / ‖ΔW‖_F
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.catalog import methods
from pefttutor.kernels.precision import unrounded
from pefttutor.method import Attachment, detach
from pefttutor.parts.attachment import attachments
from pefttutor.parts.freezing import fully_trained
from pefttutor.parts.layer_change import LayerChange
from pefttutor.parts.linear import sizes, stored_as, why_not_linear
from pefttutor.parts.lowrank_layer import singular_factors
from pefttutor.parts.lowrank_targets import lowrank_targets
from pefttutor.parts.part import Part, owners_of_each
from pefttutor.saving.contents import listed, savable
from pefttutor.saving.peft_modules import names_for

__all__ = ["as_lora"]


@torch.no_grad()
def as_lora(
    model: nn.Module,
    *,
    r: int,
    name: str | None = None,
    modules_to_save: Collection[str] = (),
    leave_out: bool = False,
) -> dict[str, float]:
    """Put a LoRA of rank r in the place of the attachment called `name`, or of the only one; return what is lost.

    That is the relative error ‖ΔW − B A‖_F / ‖ΔW‖_F of each layer: 0 where the change has no larger rank, 1 where
    nothing is left of it. The base is what it was, bit for bit.

    modules_to_save: modules that stay as they have become, whole, besides those that the method has named itself.
    leave_out: drop what a LoRA can't hold, such as changed biases and norms; without, that is an error.

    >>> from pefttutor.selective import LastLayers; from pefttutor.lowrank import DoRA
    >>> model = DoRA(r=2, target_modules=("0",)).attach(nn.Sequential(nn.Linear(6, 4)))
    >>> _ = model[0].lora_magnitude_vector.data.mul_(2)                          # ΔW = W
    >>> round(as_lora(model, r=4)["0"], 5)
    0.0

    Cost: a singular value decomposition of each changed weight, out·in·min(out, in).
    Raises: ValueError for what can't be folded into weights, what another attachment builds on, changes that a LoRA
        can't hold, or none at all; RuntimeError if it is merged, or switched off. The model is then as it was.
    Source: Eckart and Young 1936.
    """
    attachment = savable(model, name)
    lora = methods()["LoRA"](r=r, lora_alpha=r, modules_to_save=modules_to_save)
    _check_foldable(model, attachment)
    with unrounded(next(iter(attachment.tensors(model).values()))):
        return _replaced(model, attachment, lora, leave_out)


def _replaced(model: nn.Module, attachment: Attachment, lora: Any, leave_out: bool) -> dict[str, float]:
    """The relative errors, after `lora` has got its targets and the attachment's place."""
    kind, r = type(attachment.method).__name__, lora.r
    whole = tuple(dict.fromkeys([*getattr(attachment.method, "modules_to_save", ()), *lora.modules_to_save]))
    kept = {key for keys in fully_trained(model, whole) for key in keys}
    layers = [part for part in attachment.parts if isinstance(part, LayerChange)]
    became, changes = _in_place(model, [part for part in attachment.parts if part not in layers])
    deltas, rest = _of_layers(layers, r)
    more, others = _of_weights(model, {key: d for key, d in changes.items() if key not in kept}, r)
    rest += others
    for path, delta in more.items():  # a weight that is written in training, and a change beside it
        deltas[path] = deltas[path] + delta if path in deltas else delta
    if rest and not leave_out:
        raise ValueError(
            f"{attachment.name!r} ({kind}) has also changed {listed(rest)}, which a LoRA of rank {r} can't hold. Name "
            "their modules in modules_to_save, to keep these whole, or drop the change: leave_out=True."
        )
    if not deltas:
        raise ValueError(
            f"{attachment.name!r} ({kind}) has changed no linear layer that takes a LoRA of rank {r}."
        )
    targets = names_for(model, list(deltas))
    lora = dataclasses.replace(lora, target_modules=targets, modules_to_save=whole)
    lowrank_targets(model, lora)
    values = {key: became[key] for key in kept & became.keys()}
    errors = dict.fromkeys(rest, 1.0)
    for path, delta in deltas.items():
        A, B = singular_factors(delta, slice(r), 1.0)
        errors[path] = float((delta - B @ A).norm() / delta.norm())
        values |= {f"{path}.lora_A": A, f"{path}.lora_B": B}
    detach(model, attachment.name)
    lora.attach(model, name=attachment.name)
    _fill(model, attachment.name, values)
    return errors


def _fill(model: nn.Module, name: str, values: dict[str, Tensor]) -> None:
    attachment = savable(model, name)
    for key, tensor in attachment.tensors(model).items():
        if key in values:
            tensor.copy_(values[key])
    for part in attachment.parts:
        part.loaded()


def _check_foldable(model: nn.Module, attachment: Attachment) -> None:
    kind = type(attachment.method).__name__
    for part in attachment.parts:
        try:
            part.check_foldable()
        except ValueError as error:
            raise ValueError(f"{attachment.name!r} ({kind}) can't become a LoRA: {error}") from None
    carried = attachments(model)
    assert carried is not None
    order = list(carried.by_name.values())
    weights = {id(t) for part in attachment.parts for t in part.touched()}
    for other in order[order.index(attachment) + 1 :]:
        parts = [part for part in other.parts if isinstance(part, LayerChange) and not part.additive]
        if any(id(t) in weights for part in parts for t in part.touched()):
            raise ValueError(
                f"{attachment.name!r} ({kind}) can't become a LoRA: that would act after {other.name!r} "
                f"({type(other.method).__name__}), which builds on what it has made of the same weight. Take that one "
                "out first: pefttutor.detach."
            )


Deltas = tuple[
    dict[str, Tensor], list[str]
]  # what a LoRA can hold, by the layer as (out, in); the others' names


def _of_layers(parts: list[LayerChange], r: int) -> Deltas:
    """Of changes of single layers, in which a tied weight is another's as well, who doesn't change."""
    deltas, rest = {}, []
    for part in parts:
        weight, bias = (None if t is None else _wide(t) for t in part.beneath())
        assert weight is not None
        now, shifted = part.folded_into(weight, bias)
        if not now.equal(weight) and min(weight.shape) >= r:
            deltas[part.path] = now - weight
        elif not now.equal(weight):
            rest.append(f"{part.path}.weight".lstrip("."))
        if bias is not None and shifted is not None and not shifted.equal(bias):
            rest.append(f"{part.path}.bias".lstrip("."))
    return deltas, rest


def _in_place(model: nn.Module, parts: list[Part]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the base's own tensors have become, and by how much they have changed, if they have."""
    names = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    touched = list({id(t): t for part in parts for t in part.touched()}.values())
    for part in parts:
        part.fold()
    became = {names[id(t)]: t.clone() for t in touched}
    for part in reversed(parts):
        part.unfold()
    for part in reversed(parts):
        part.switch(False)
    before = {names[id(t)]: t.clone() for t in touched}
    for part in parts:
        part.switch(True)
    different = [key for key, now in became.items() if not now.equal(before[key])]
    return became, {key: _wide(became[key]) - _wide(before[key]) for key in different}


def _of_weights(model: nn.Module, changes: dict[str, Tensor], r: int) -> Deltas:
    """Of changes of weights, each in every layer that it is tied to."""
    paths = {id(module): path for path, module in model.named_modules()}
    own = {name: t for name, t in (*model.named_parameters(), *model.named_buffers())}
    holders = owners_of_each(model, [own[key] for key in changes])
    deltas: dict[str, Tensor] = {}
    rest = []
    for key, delta in changes.items():
        places = holders[id(own[key])]
        if places and all(name == "weight" and _is_linear(at) and min(sizes(at)) >= r for at, name in places):
            deltas |= {paths[id(layer)]: stored_as(layer, delta) for layer, _ in places}
        else:
            rest.append(key)
    return deltas, rest


def _is_linear(layer: nn.Module) -> bool:
    changes = vars(layer).get("_changes", {})
    before = next(iter(changes.values()), None)  # then the layer itself can't be asked any more
    return (before.odd if before else why_not_linear(layer)) is None


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
