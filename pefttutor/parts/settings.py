"""What a method's settings may be, and one sentence for all refusals: what was given, and what it must be."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

__all__ = [
    "check_choice", "check_examples", "check_fraction", "check_names", "check_number", "check_whole", "shown",
]  # fmt: skip


def shown(value: Any) -> str:
    """What was given, on one line of a message: of a tensor its shape and dtype, of long lists the beginning.

    >>> import torch
    >>> shown(torch.ones(2, 3)), shown(8), shown(list(range(100)))
    ('a tensor (2, 3) of torch.float32', '8', '[0, 1, 2, 3, 4, 5, ...]')
    """
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return reprlib.repr(value)


def _refuse(name: str, value: Any, expected: str) -> None:
    raise ValueError(f"{name} is {shown(value)}; it must be {expected}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def check_whole(method: Any, name: str, *, least: int = 1) -> None:
    """Raise ValueError unless the field is a whole number of at least `least`."""
    value = getattr(method, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        _refuse(name, value, f"a whole number ≥ {least}")


def check_number(
    method: Any,
    name: str,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    hint: str = "",
) -> None:
    """Raise ValueError unless the field is a finite number with above < value, least ≤ value and value < below."""
    value = getattr(method, name)
    if _is_number(value) and above < value < below and value >= least and math.isfinite(value):
        return
    bounds = [f"> {above:g}"] * (above > -math.inf) + [f"≥ {least:g}"] * (least > -math.inf)
    bounds += [f"< {below:g}"] * (below < math.inf)
    _refuse(name, value, f"a number {' and '.join(bounds)}".rstrip() + hint)


def check_fraction(method: Any, name: str = "fraction") -> None:
    """Raise ValueError unless the field is a number in (0, 1]."""
    value = getattr(method, name)
    if not _is_number(value) or not 0 < value <= 1:
        _refuse(name, value, "in (0, 1], such as 0.005 for half a percent")


def check_choice(method: Any, name: str, choices: Collection[Any]) -> None:
    """Raise ValueError unless the field is one of `choices`."""
    value = getattr(method, name)
    if value not in choices:
        _refuse(name, value, f"one of {', '.join(map(repr, choices))}")


def check_names(method: Any, *names: str) -> None:
    """Make fields that hold names of modules tuples, or leave one string for the whole name as it is.

    Raises: ValueError for a string where several names are meant, or for what isn't names.
    """
    for name in names:
        value = getattr(method, name)
        if isinstance(value, str) and name in ("modules_to_save", "adapters"):
            raise ValueError(f"{name} is a string; write ({value!r},).")
        if isinstance(value, str) or value is None:
            continue
        if name == "target_modules" and isinstance(value, Collection) and not value:
            raise ValueError(f"{name} is empty; name at least one module, such as ('q_proj', 'v_proj').")
        if not isinstance(value, Collection) or not all(isinstance(each, str) for each in value):
            _refuse(name, value, "names of modules, such as ('q_proj', 'v_proj')")
        object.__setattr__(method, name, tuple(value))


def check_examples(method: Any, examples: Sequence[Any] | None, *, labels: bool = True) -> Sequence[Any]:
    """The examples. Raises: ValueError if there are none, or one has no labels and the choice needs them."""
    name = type(method).__name__
    if not examples:
        raise ValueError(f"{name} chooses by data: attach(model, examples), encoded, with labels.")
    for example in examples if labels else ():
        if "labels" not in example:
            raise ValueError(
                f"{name} chooses by the loss and needs labels, and an example has only {', '.join(example)}: "
                "add labels, or give log_likelihood=, a function (model, batch) → one value an example."
            )
    return examples
