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

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pefttutor.parts.attachment import DEFAULT, Attachment, attaching, attachments, find
from pefttutor.parts.freezing import freeze, trainable
from pefttutor.parts.switching import detach, merge, merged, switch, unmerge

__all__ = [
    "DEFAULT",
    "Attachment",
    "Counts",
    "Method",
    "Restores",
    "Trains",
    "adapted",
    "attached",
    "attaching",
    "attachments_of",
    "detach",
    "find",
    "find_own",
    "freeze",
    "learning",
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

    def unfinished(self, model: nn.Module) -> str | None:
        """Training is over: what the method was still to do, and what to do about it; None if nothing is missing."""


@runtime_checkable
class Counts(Protocol):
    """What memory asks of a method, where it has it."""

    def count(self, model: nn.Module) -> int:
        """Trained parameters by the closed formula, without attaching."""


class Restores(Protocol):
    """What saving asks of a method that has chosen by data among what it adds."""

    def restore(self, model: nn.Module, tensors: Mapping[str, Tensor], *, name: str = DEFAULT) -> nn.Module:
        """Attach, with the choice that a file's tensors tell of; these are then copied in."""


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


def attachments_of(model: nn.Module, method: Any) -> list[Attachment]:
    """The attachments of this method, whether or not they take effect."""
    return [a for a in attached(model).values() if a.method == method]


def find_own(model: nn.Module, method: Any, name: str | None, *, changing: str) -> Attachment:
    """The attachment of this method whose values a function of it is to change: that of the name, or its only one.

    changing: what is changed, for the message.

    Raises: ValueError if there is none, or several, or the name is another method's; RuntimeError if it is merged.
    """
    mine = attachments_of(model, method)
    attachment = mine[0] if name is None and len(mine) == 1 else find(model, name)
    if attachment.method != method:
        raise ValueError(f"{attachment.name!r} is {attachment.method}, and not this method, {method}.")
    if attachment.merged:
        raise RuntimeError(
            f"{attachment.name!r} is merged with the {changing} it had: pefttutor.unmerge(model) first."
        )
    return attachment


def learning(model: nn.Module, method: Any) -> list[Attachment]:
    """The attachments of this method that take effect and train, for its hooks."""
    return [a for a in attachments_of(model, method) if a.learns]


def trained_by(model: nn.Module, method: Any) -> list[nn.Parameter]:
    """What the attachments of this method train at the moment, for a hook that is to touch nothing else.

    A method that isn't attached, as one that is given to `fit` alone, is taken to train all that trains.
    """
    mine = [a for a in attached(model).values() if a.method is method or a.method == method]
    if not mine:
        return [p for p in model.parameters() if p.requires_grad]
    return list(dict.fromkeys(p for a in mine if a.learns for p in a.trained()))
