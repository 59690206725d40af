"""What is said to train, trains: looked at once, in the first step of a training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pefttutor.method import attached
from pefttutor.parts.layer_change import LayerChange

__all__ = ["Watch"]

SHOWN = 3  # names in a warning


class Watch:
    """Compares, after the first backward pass and step, what should train with what got a gradient and can move.

    Each finding is a warning that names the tensors and the likely cause: training goes on.

    >>> with warnings.catch_warnings(record=True, action="always") as said:
    ...     Watch(nn.Linear(1, 1)).after_backward({})            # there was no backward pass
    >>> print(str(said[0].message).partition(".")[0])
    'weight', 'bias': should train and got no gradient in the first step
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.done = model, False
        persistent = model.state_dict().keys()  # the others are made anew from the configuration
        self.buffers = {n: b._version for n, b in model.named_buffers() if n in persistent}

    def after_backward(self, learning_rates: Mapping[int, float]) -> None:
        """The gradients are complete. `learning_rates`: the peak of each parameter's, by its id."""
        if self.done:
            return
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        without = [name for name, p in trained.items() if p.grad is None]
        if without:
            _warn(without, "should train and got no gradient in the first step", self._cause(without))
        stuck = [name for name, p in trained.items() if _cannot_move(p, learning_rates.get(id(p)))]
        if stuck:
            kind = trained[stuck[0]].dtype
            advice = f"a step is smaller than the gap between two numbers of {kind}: keep them in float32, or raise lr"
            _warn(stuck, "can't move", advice)

    def after_step(self) -> None:
        """The first step is done."""
        if self.done:
            return
        self.done = True
        kept = {id(t) for a in attached(self.model).values() for part in a.parts for _, t in part.saved()}
        changed = [
            name
            for name, b in self.model.named_buffers()
            if id(b) not in kept and b._version != self.buffers.get(name, b._version)
        ]
        if changed and attached(self.model):
            advice = (
                "name the module that holds it in modules_to_save, or call .eval() on it in its own train()"
            )
            _warn(changed, "is changed by training, and no method saves it", advice)

    def _cause(self, names: Iterable[str]) -> str:
        changes = [p for a in attached(self.model).values() for p in a.parts if isinstance(p, LayerChange)]
        silent = [change.path for change in changes if change.learns and not change.called]
        if silent:
            return (
                f"{silent[0]!r} is never called: the model reads its weight in another way, or doesn't use it for this "
                "input (an expert that no token was sent to)"
            )
        if any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            return "under checkpointing with use_reentrant=True a block gets gradients only if its input does"
        return (
            "nothing leads from them to the loss: a layer that the model doesn't call for this input, or whose weight "
            "it reads without calling it"
        )


def _cannot_move(parameter: Tensor, lr: float | None) -> bool:
    """Whether most values with a gradient are so large that a step of AdamW, of about lr, is rounded away."""
    if (
        lr is None
        or parameter.grad is None
        or not parameter.is_floating_point()
        or parameter.dtype.itemsize >= 4
    ):
        return False
    values = parameter.detach()[parameter.grad != 0].abs().float()
    gap = torch.finfo(parameter.dtype).eps / 2
    return len(values) > 0 and bool((values * gap / 2 > lr).float().mean() > 0.5)


def _warn(names: list[str], what: str, why: str) -> None:
    shown = ", ".join(repr(name) for name in names[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    warnings.warn(f"{shown}{more}: {what}. Likely: {why}.", stacklevel=4)
