"""The neck between methods and the rest: what a method may say, and what can be done with a model that carries some.

A method is a small frozen dataclass of its hyper-parameters. `attach(model)` freezes the base, adds what trains and
returns the same model. There is no base class: whatever has these functions is a method. What it has put into the
model is an attachment with a name, so that several methods can stand side by side on one model:

    model = LoRA(r=8).attach(model, name="german")
    model = BitFit().attach(model, name="bank")
    pefttutor.switch(model, "german")          # "bank" has no effect from now on
    pefttutor.merge(model)                     # fold what is active into the weights
    pefttutor.detach(model, "bank")            # and the base is as if it had never been there
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pefttutor.parts.attachment import (
    DEFAULT,
    Attachment,
    Attachments,
    attaching,
    attachments,
    check_apart,
    find,
)
from pefttutor.parts.checkpointing import close_to_checkpointing
from pefttutor.parts.freezing import freeze, trainable

__all__ = [
    "DEFAULT",
    "Attachment",
    "Counts",
    "Method",
    "Trains",
    "adapted",
    "attached",
    "attaching",
    "detach",
    "find",
    "freeze",
    "merge",
    "merged",
    "switch",
    "trainable",
    "trained_by",
    "unmerge",
]


# ---- what a method may say, by who asks


@runtime_checkable
class Method(Protocol):
    """The one shape of every method."""

    def attach(self, model: nn.Module, *sources: Any, name: str = DEFAULT) -> nn.Module:
        """Freeze the base, add what trains under `name`, and return the model (see `parts.attachment.attaching`).

        sources: what the method has to look at, such as data, masks or other models; never a field of the method.
        """


class Trains(Protocol):
    """What `fit` and the Trainer's callback ask of a method, where it has them; steps are counted from 0."""

    def penalty(self, model: nn.Module) -> Tensor:
        """Added to the loss of every step."""

    def after_backward(self, model: nn.Module, step: int) -> None:
        """The gradients are complete and the optimizer hasn't stepped: a mask of gradients, a decision by them."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """The optimizer has stepped and the gradients are still there: budgets, a merge and restart."""

    def optimizer(self, model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """The optimizer of all that trains, in AdamW's place."""


@runtime_checkable
class Counts(Protocol):
    """What memory asks of a method, where it has it."""

    def count(self, model: nn.Module) -> int:
        """Trained parameters by the closed formula, without attaching."""


# ---- what a model carries


def attached(model: nn.Module) -> dict[str, Attachment]:
    """The attachments of `model`, or of a part of it, by name and in the order of attaching; empty for a plain model.

    >>> attached(nn.Linear(2, 2))
    {}
    """
    for module in model.modules():
        if "_pefttutor" in vars(module):
            return dict(attachments(module).by_name)  # type: ignore[union-attr]
    return {}


def adapted(model: nn.Module, name: str | None = None) -> Any:
    """The method attached to `model` under `name`, or the first one; None for a plain model.

    Raises: ValueError for a name that isn't there.
    """
    if name is not None:
        there = attached(model)
        return there[name].method if name in there else find(model, name).method
    return next((attachment.method for attachment in attached(model).values()), None)


def trained_by(model: nn.Module, method: Any) -> list[nn.Parameter]:
    """What the attachments of this method train at the moment, for a hook that is to touch nothing else.

    A method that isn't attached, as one that is given to `fit` alone, is taken to train all that trains.
    """
    mine = [a for a in attached(model).values() if a.method is method or a.method == method]
    if not mine:
        return [p for p in model.parameters() if p.requires_grad]
    return list(dict.fromkeys(p for a in mine if a.learns for p in a.trained()))


def merged(model: nn.Module) -> bool:
    """Whether one of the attachments is folded into the weights at the moment."""
    return any(attachment.merged for attachment in attached(model).values())


def switch(model: nn.Module, *names: str, train: tuple[str, ...] | None = None) -> nn.Module:
    """Let exactly the named attachments take effect from now on; without names, the model is the plain base.

    train: which of them train when the model is trained next; None lets all of them.

    Raises: ValueError for a name that isn't there, one that is merged, two that change the same tensor in place, or
        `train` that names others. Nothing has been changed then.
    """
    carried = _carried(model)
    chosen, learning = [find(model, name) for name in names], names if train is None else train
    if isinstance(train, str) or not set(learning) <= set(names):
        raise ValueError(f"train is {train!r}; expected some of the names that are switched on, {names!r}.")
    changing = [a for a in carried.by_name.values() if a.active != (a in chosen)]
    for attachment in changing:
        if attachment.merged:
            raise ValueError(
                f"{attachment.name!r} is merged into the weights: pefttutor.unmerge(model) first."
            )
    for i, one in enumerate(chosen):
        check_apart(Attachments({a.name: a for a in chosen[:i]}, None, frozenset()), one, switched=True)
    for attachment in reversed([a for a in changing if a.active]):
        _switch(attachment, False)
    for attachment in [a for a in changing if a in chosen]:
        _switch(attachment, True)
    for attachment in chosen:
        attachment.trains = attachment.name in learning
    carried.apply(model)
    return model


def _switch(attachment: Attachment, on: bool) -> None:
    for part in attachment.parts if on else reversed(attachment.parts):
        part.switch(on)
    attachment.active = on


# ---- folding into the weights, and taking out


def merge(model: nn.Module, *names: str) -> nn.Module:
    """Fold attachments into the weights: the same function at the base's cost. Without names, all that are active.

    The base's weights are kept aside for `unmerge`. To keep the change for good, see `detach`.

    Raises: ValueError for a name that isn't there, an attachment that can't be folded, or one that shares a weight
        with another; RuntimeError for one that is merged already. Nothing has been changed then.
    """
    chosen = _chosen(model, names, [a for a in attached(model).values() if a.active])
    for attachment in chosen:
        if attachment.merged:
            raise RuntimeError(f"{attachment.name!r} is merged already: call unmerge(model) first.")
        if not attachment.active:
            raise ValueError(f"{attachment.name!r} is switched off: pefttutor.switch(model, …) first.")
        _check_foldable(model, attachment, chosen)
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise RuntimeError("merging inside torch.autocast would round the weights: merge outside of it.")
    for attachment in chosen:
        for part in attachment.parts:
            part.fold()
        attachment.merged = True
    return model


def unmerge(model: nn.Module, *names: str) -> nn.Module:
    """Put the base's weights back, exactly as they were. Without names, for all that are merged.

    Raises: RuntimeError if nothing is merged, ValueError for a name that isn't there.
    """
    chosen = _chosen(model, names, [a for a in attached(model).values() if a.merged])
    for attachment in chosen:
        if not attachment.merged:
            raise RuntimeError(f"{attachment.name!r} isn't merged, so there is nothing to unmerge.")
    if not chosen:
        raise RuntimeError("this model isn't merged, so there is nothing to unmerge.")
    for attachment in reversed(chosen):
        for part in reversed(attachment.parts):
            part.unfold()
        attachment.merged = False
    return model


def detach(model: nn.Module, *names: str, keep: bool = False) -> nn.Module:
    """Take attachments out of the model again, all of them without names.

    The base is then, bit for bit, what it was before. With `keep=True` the base keeps what was learned: the change is
    folded in for good, and the model is a plain one that `save_pretrained` writes as such.

    Raises: ValueError for a name that isn't there, or with `keep` an attachment that can't be folded in; RuntimeError
        if nothing is attached. Nothing has been changed then.
    """
    carried = _carried(model)
    chosen = _chosen(model, names, list(carried.by_name.values()))
    unmerged = [attachment.name for attachment in chosen if not attachment.merged]
    if keep and unmerged:
        merge(model, *unmerged)
    for attachment in reversed(chosen):
        if keep:
            for part in attachment.parts:
                part.keep(model)
        elif attachment.merged:
            unmerge(model, attachment.name)
        if attachment.active and not keep:
            _switch(attachment, False)
        for part in reversed(attachment.parts):
            part.remove()
        del carried.by_name[attachment.name]
    carried.apply(model)
    if not carried.by_name:
        close_to_checkpointing(model)
        del vars(model)["_pefttutor"]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in carried.trained)
    return model


def _carried(model: nn.Module) -> Attachments:
    carried = attachments(model)
    if carried is None:
        raise RuntimeError("no method is attached to this model: call attach(model) of a method first.")
    return carried


def _chosen(model: nn.Module, names: tuple[str, ...], otherwise: list[Attachment]) -> list[Attachment]:
    _carried(model)
    return [find(model, name) for name in dict.fromkeys(names)] if names else otherwise


def _check_foldable(model: nn.Module, attachment: Attachment, together: list[Attachment]) -> None:
    """Raise ValueError if a part can't be folded, or if the result would depend on another attachment."""
    for part in attachment.parts:
        part.check_foldable()
    for other in attached(model).values():
        if other in together or not other.active:
            continue
        for theirs in other.parts:
            for ours in attachment.parts:
                shared = {id(t) for t in theirs.touched()} & {id(t) for t in ours.touched()}
                if shared and not (theirs.additive and ours.additive):
                    raise ValueError(
                        f"{attachment.name!r} ({type(attachment.method).__name__}) and {other.name!r} "
                        f"({type(other.method).__name__}) share a weight, so one can't be merged without the other: "
                        "name both, or switch that one off."
                    )
