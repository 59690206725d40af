"""What is wrong with a result, in words: the plainest thing first."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pefttutor.check.values import close, describe, different_numbers, leaves

if TYPE_CHECKING:
    from pefttutor.check.compare import Run

DETACHED = (
    "the result is cut off from the graph: .data, .detach(), .item(), torch.tensor(…) or torch.no_grad()"
)


def difference(theirs: Run, right: Run, rtol: float, atol: float) -> dict[str, str] | None:
    """Lines for the message (expected, came, perhaps likely); None when nothing is wrong."""
    return (
        _different_result(theirs.result, right.result, rtol, atol)
        or _different_side_effects(theirs, right)  # before the gradients, which it spoils
        or _different_gradients(theirs, right, rtol, atol)
    )


def _different_result(came: Any, expected: Any, rtol: float, atol: float) -> dict[str, str] | None:
    if came is None and expected is not None:
        return {
            "expected": describe(expected),
            "came": "None",
            "likely": "the function doesn't return its result",
        }
    ours, theirs = list(leaves(came)), list(leaves(expected))
    if [name for name, _ in ours] != [name for name, _ in theirs]:
        return _different_structures(came, expected, ours, theirs)
    for (name, a), (_, b) in zip(ours, theirs, strict=True):
        at = f"result{name}: " if name else ""
        if isinstance(b, Tensor):
            lines = _different_tensors(a, b, rtol, atol)
        elif close(a, b, rtol=rtol, atol=atol):
            lines = None
        else:
            lines = {"expected": describe(b), "came": describe(a)}
        if lines:
            return {key: at + text if key != "likely" else text for key, text in lines.items()}
    return None


def _different_structures(
    came: Any, expected: Any, ours: list[tuple[str, Any]], theirs: list[tuple[str, Any]]
) -> dict[str, str]:
    lines = {"expected": describe(expected), "came": describe(came)}
    if lines["expected"] != lines["came"]:
        return lines
    at = next(i for i, pair in enumerate(zip_longest(ours, theirs)) if not close(*pair))
    return {
        key: f"{text} of {len(found)}, "
        + (f"and {found[at][0]} is {describe(found[at][1])}" if at < len(found) else "which ends there")
        for (key, text), found in zip(lines.items(), (theirs, ours), strict=True)
    }


def _different_tensors(came: Any, expected: Tensor, rtol: float, atol: float) -> dict[str, str] | None:
    if not isinstance(came, Tensor):
        return {
            "expected": f"a tensor, {describe(expected)}",
            "came": f"{type(came).__name__} {describe(came)}",
        }
    lines = {"expected": f"shape {tuple(expected.shape)}", "came": f"shape {tuple(came.shape)}"}
    if came.shape != expected.shape:
        if came.ndim > 1 and came.mT.shape == expected.shape:
            lines["likely"] = "it is transposed"
        return lines
    if not close(came, expected, rtol=rtol, atol=atol):
        ours, theirs = different_numbers(came, expected, rtol=rtol, atol=atol)
        lines = {
            "expected": f"{lines['expected']}, numbers {theirs}",
            "came": f"{lines['came']}, numbers {ours}",
        }
        factor = _factor(came, expected)
        if factor is not None:
            lines["likely"] = f"every number is {factor:.4g} times what it should be"
        return lines
    if came.dtype != expected.dtype:
        likely = "the result doesn't keep the dtype of its input"
        return {"expected": str(expected.dtype), "came": str(came.dtype), "likely": likely}
    if expected.requires_grad and not came.requires_grad:
        return {
            "expected": "a result that gradients can flow through",
            "came": "one they can't",
            "likely": DETACHED,
        }
    return None


def _factor(came: Tensor, expected: Tensor) -> float | None:
    """The one number by which `came` differs from `expected`, if there is one."""
    a, b = came.detach().double().reshape(-1), expected.detach().double().reshape(-1)
    if a.numel() < 2 or not a.abs().sum() or not b.abs().sum():
        return None
    factor = float((a @ b) / (b @ b))
    return factor if torch.allclose(a, factor * b, rtol=1e-3, atol=1e-6) else None


def _different_gradients(theirs: Run, right: Run, rtol: float, atol: float) -> dict[str, str] | None:
    for name, expected in right.gradients.items():
        came = theirs.gradients[name]
        if expected is None and came is not None and came.abs().sum() > 0:
            return {
                "expected": f"no gradient for {name}: it is frozen here",
                "came": f"a gradient {describe(came)}",
                "likely": f"{name} takes part in the graph; it should be detached",
            }
        if expected is not None and came is None:
            return {
                "expected": f"a gradient for {name}",
                "came": "the right numbers, but no gradient",
                "likely": DETACHED,
            }
        if expected is not None and not close(came, expected, rtol=rtol, atol=atol):
            wrong, its = different_numbers(came, expected, rtol=rtol, atol=atol)  # type: ignore[arg-type]
            return {
                "expected": f"the gradient of {name}: {its}",
                "came": f"the right numbers forward, but the gradient {wrong}",
            }
    return None


def _different_side_effects(theirs: Run, right: Run) -> dict[str, str] | None:
    for name in theirs.changed:
        if name not in right.changed:
            return {
                "expected": f"{name} as it was given",
                "came": f"the right result, but {name} has changed",
                "likely": "an operation in place (`+=`, `x[…] =`, a name ending in `_`) on an input",
            }
    for name in right.changed:
        if not close(theirs.inputs[name], right.inputs[name]):
            return {
                "expected": f"{name} changed by the rule",
                "came": f"{name} isn't what it should be afterwards",
            }
    return None
