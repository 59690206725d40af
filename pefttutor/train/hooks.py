"""What the attached methods, and their parts, have to say in a training step."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.catalog import methods
from pefttutor.method import Trains, attached

__all__ = ["Hooks"]

HOOKS = tuple(name for name in vars(Trains) if not name.startswith("_"))


class Hooks:
    """The hooks of all methods that take part in a training, in the order of attaching; see `pefttutor.method.Trains`.

    >>> from pefttutor.selective import ChildTuningF
    >>> hooks = Hooks(ChildTuningF().attach(nn.Linear(1, 1)))
    >>> hooks.having("penalty"), hooks.penalty().item(), hooks.changes_gradients
    ([], 0.0, True)

    method: asked in the place of those that are attached, or None. Two attachments of equal methods are one method
    here: its hooks look for all that it has attached.

    Raises: ValueError for a method that has nothing to say in a step, or belongs to the package and isn't attached.
    """

    def __init__(self, model: nn.Module, method: Any = None) -> None:
        self.model = model
        if method is not None:
            _check(model, method)
        learning = [attachment for attachment in attached(model).values() if attachment.learns]
        methods: list[Any] = [attachment.method for attachment in learning] if method is None else [method]
        self.methods = [m for i, m in enumerate(methods) if m not in methods[:i]]

    def having(self, hook: str) -> list[Any]:
        """The methods that have this hook."""
        return [method for method in self.methods if hasattr(method, hook)]

    @property
    def changes_gradients(self) -> bool:
        """Whether something happens between the backward pass and the clipping."""
        return bool(self.having("penalty") or self.having("after_backward"))

    def optimizer(self, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """The optimizer that a method brings, else AdamW over all that trains.

        Raises: ValueError if several methods bring one.
        """
        bringing = self.having("optimizer")
        if len(bringing) > 1:
            names = " and ".join(type(method).__name__ for method in bringing)
            raise ValueError(
                f"{names} each bring an optimizer of their own, and a training has one: let one of them train at a "
                "time, pefttutor.switch(model, …, train=(…,))."
            )
        if bringing:
            return bringing[0].optimizer(self.model, lr=lr, weight_decay=weight_decay)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)

    def penalty(self) -> Tensor:
        """The sum of all penalties; 0 without any."""
        found = [method.penalty(self.model) for method in self.having("penalty")]
        return sum(found[1:], found[0]) if found else torch.zeros((), requires_grad=True)

    def after_backward(self, step: int) -> None:
        for method in self.having("after_backward"):
            method.after_backward(self.model, step)

    def after_step(self, step: int) -> None:
        """First the parts, whose values may belong into weights; then the methods, which may look at these."""
        for attachment in attached(self.model).values():
            for part in attachment.parts if attachment.learns else ():
                part.after_step()
        for method in self.having("after_step"):
            method.after_step(self.model, step)

    def warn_of_unfinished(self) -> None:
        """Training is over: say what a method was still to do."""
        for method in self.having("unfinished"):
            if words := method.unfinished(self.model):
                warnings.warn(f"{type(method).__name__}: {words}", stacklevel=3)


def _check(model: nn.Module, method: Any) -> None:
    """Raise ValueError for a method that would do nothing: the model would be trained as if it weren't there."""
    kind = method.__name__ if isinstance(method, type) else type(method).__name__
    known = isinstance(method, tuple(methods().values()))  # or of a class made of one of them
    if known and method not in [attachment.method for attachment in attached(model).values()]:
        raise ValueError(
            f"method={kind}(…) isn't attached to this model, so nothing of it would train. Attach it first, "
            f"{kind}(…).attach(model), and leave method= out: what is attached is asked by itself."
        )
    if isinstance(method, type) or not (known or any(hasattr(method, hook) for hook in HOOKS)):
        raise ValueError(
            f"method={kind} has nothing to say in a training step; expected an object with at least one of "
            f"{', '.join(HOOKS)}. A method of pefttutor is attached to the model instead."
        )
