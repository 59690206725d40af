"""Compare a learner's result with the reference's on one input, in everything that matters later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.check.core import NotAttempted, describe_inputs, explained, is_stub, wrong
from pefttutor.check.differences import difference
from pefttutor.check.values import ATOL, RTOL, close, fresh, leaves

# What it is in words -> an implementation with exactly that mistake, called like the reference.
Mistakes = Mapping[str, Callable[..., Any]]


def same_result(
    attempt: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    gradients: Sequence[str] = (),
    mistakes: Mistakes | None = None,
    rtol: float = RTOL,
    atol: float = ATOL,
) -> Any:
    """The learner's result, when it is the reference's on these inputs, in everything that matters later.

    inputs:    by name of the argument; each call gets its own copy. A module among them is compared afterwards, too.
    gradients: the tensors whose gradient must agree, and (None = None) must be missing where the reference has none.
    mistakes:  wrong implementations that learners write, each with its name. When the learner's answer is what one
               of them gives, the message names it.
    Raises: AssertionError with the input, what was expected, what came, and the likely mistake.
    """
    right = Run(reference, inputs, gradients)
    if right.error:
        raise right.error
    known = {name: Run(mistake, inputs, gradients) for name, mistake in (mistakes or {}).items()}
    theirs = Run(attempt, inputs, gradients)
    if isinstance(theirs.error, NotAttempted):
        raise theirs.error
    name = next((name for name, run in known.items() if theirs.agrees(run, rtol, atol)), None)
    if theirs.error:
        raise explained(theirs.error, inputs, likely=name) from theirs.error
    lines = difference(theirs, right, rtol, atol)
    if lines:
        likely = name or lines.pop("likely", None)
        raise wrong(input=describe_inputs(inputs), **{**lines, "likely": likely})
    return theirs.result


class Run:
    """One call on a copy of the inputs: the result or the error, the gradients, and the inputs afterwards."""

    def __init__(
        self, function: Callable[..., Any], inputs: Mapping[str, Any], gradients: Sequence[str]
    ) -> None:
        self.before = fresh(inputs)
        self.inputs = fresh(inputs, gradients)
        self.result: Any = None
        self.error: Exception | None = None
        self.gradients: dict[str, Tensor | None] = {}
        try:
            self.result = function(**self.inputs)
            self.gradients = self._gradients(gradients)
        except Exception as error:
            self.error = NotAttempted() if is_stub(error) else error

    def _gradients(self, names: Sequence[str]) -> dict[str, Tensor | None]:
        """The gradient of a fixed weighted sum of all results, so that no two places can stand for each other."""
        connected = [
            leaf for _, leaf in leaves(self.result) if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        if not names or not connected:
            return dict.fromkeys(names)
        generator = torch.Generator().manual_seed(0)
        weighted = [(leaf * torch.rand(leaf.shape, generator=generator).to(leaf)).sum() for leaf in connected]
        total = torch.stack(weighted).sum()
        gradients = torch.autograd.grad(total, [self.inputs[name] for name in names], allow_unused=True)
        return dict(zip(names, gradients, strict=True))

    @property
    def changed(self) -> list[str]:
        """The inputs that aren't what they were."""
        return [name for name, value in self.inputs.items() if not _untouched(value, self.before[name])]

    def agrees(self, other: Run, rtol: float, atol: float) -> bool:
        """Whether the two can't be told apart: the same error, or the same result, gradients and side effects."""
        if self.error or other.error:
            return type(self.error) is type(other.error) and str(self.error) == str(other.error)
        tolerance = {"rtol": rtol, "atol": atol}
        return (
            close(self.result, other.result, **tolerance)
            and close(self.gradients, other.gradients, **tolerance)
            and self.changed == other.changed
        )


def _untouched(value: Any, before: Any) -> bool:
    if isinstance(value, Tensor | nn.Module | Mapping):
        return close(value, before, rtol=0, atol=0)
    return True
