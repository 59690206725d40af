"""The hooks of attached methods inside `transformers.Trainer`, for those who train with it instead of `fit`."""

import warnings
from typing import Any

import torch
from torch import nn

from pefttutor.train.hooks import Hooks
from pefttutor.train.watch import Watch

__all__ = ["callback"]


def callback(method: Any = None) -> Any:
    """A TrainerCallback that calls the hooks of the attached methods where `pefttutor.fit` does.

        trainer = Trainer(model, args, train_dataset=…, callbacks=[pefttutor.callback()])

    Before each optimizer step the penalty's gradient is added, then after_backward runs; after it, after_step.
    The Trainer clips before callbacks are called. A penalty or mask that came later would escape the clipping,
    so for a method with these hooks the callback sets `args.max_grad_norm` to 0 while training runs and clips to
    the given norm itself, after them, as `fit` does.

    A callback can't choose the optimizer. For a method that brings its own, give it to the Trainer:
    `Trainer(…, optimizers=(method.optimizer(model, lr=…, weight_decay=…), None))`. With another one, it warns.

    >>> from types import SimpleNamespace; from pefttutor.selective import ChildTuningF
    >>> arguments = SimpleNamespace(fp16=False, max_grad_norm=1.0)
    >>> callback().on_train_begin(arguments, None, None, model=ChildTuningF().attach(nn.Linear(1, 1)))
    >>> arguments.max_grad_norm                                  # its mask comes after the Trainer's clipping
    0.0

    method: asked in the place of those that are attached, or None.

    Raises: ValueError at the start of training with fp16 and a penalty or after_backward: the Trainer's gradients
        are then scaled by a factor that the hooks don't know. bf16 has no such factor.
    """
    from transformers import TrainerCallback

    class MethodCallback(TrainerCallback):
        max_grad_norm = 0.0  # what this callback clips to; 0 leaves clipping to the Trainer

        def on_train_begin(
            self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
        ) -> None:
            assert model is not None
            self.hooks, self.watch = Hooks(model, method), Watch(model)
            if kwargs.get("optimizer") is not None:
                _warn_of_another(self.hooks, kwargs["optimizer"], args.learning_rate)
            if not self.hooks.changes_gradients:
                return
            if args.fp16:
                names = ", ".join(type(method).__name__ for method in self.hooks.methods)
                raise ValueError(f"{names} changes gradients, which fp16 scales: use bf16=True")
            # A run that broke off had no on_train_end: then the norm is still here and the Trainer's is 0.
            self.max_grad_norm = args.max_grad_norm or self.max_grad_norm
            args.max_grad_norm = 0.0

        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
        ) -> None:
            assert model is not None
            if self.hooks.having("penalty"):
                self.hooks.penalty().backward()
            groups = kwargs["optimizer"].param_groups if kwargs.get("optimizer") is not None else []
            peaks = {id(p): group.get("initial_lr", group["lr"]) for group in groups for p in group["params"]}
            self.watch.after_backward(peaks)
            self.hooks.after_backward(state.global_step)
            if self.max_grad_norm:
                nn.utils.clip_grad_norm_(model.parameters(), self.max_grad_norm)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.hooks.after_step(state.global_step)
            self.watch.after_step()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.hooks.warn_of_unfinished()
            if self.max_grad_norm:
                args.max_grad_norm, self.max_grad_norm = self.max_grad_norm, 0.0

    return MethodCallback()


def _warn_of_another(hooks: Hooks, optimizer: Any, lr: float) -> None:
    """Warn where a method brings an optimizer and the Trainer has one of another kind, or with other groups' rates."""
    given = getattr(optimizer, "optimizer", optimizer)  # accelerate puts one around it
    for method in hooks.having("optimizer"):
        own = method.optimizer(hooks.model, lr=lr, weight_decay=0.0)
        if type(own) is not type(given) or _by_rate(own) != _by_rate(given):
            warnings.warn(
                f"{type(method).__name__} brings an optimizer of its own, and this Trainer has another: give it "
                "optimizers=(method.optimizer(model, lr=…, weight_decay=…), None)",
                stacklevel=3,
            )


def _by_rate(optimizer: torch.optim.Optimizer) -> set[frozenset[int]]:
    """The parameters' ids, together where they learn at one rate."""
    found: dict[float, set[int]] = {}
    for group in optimizer.param_groups:
        found.setdefault(group.get("initial_lr", group["lr"]), set()).update(map(id, group["params"]))
    return {frozenset(ids) for ids in found.values() if ids}
