"""Values as a check handles them: copied, taken apart, compared, and put into words."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

RTOL, ATOL = 1e-4, 1e-6  # float32, a few hundred terms in a sum


def describe(value: Any) -> str:
    """A value in a few words: a tensor by dtype and shape, a module by its class, a small thing by itself."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return (
            f"{dtype} {tuple(value.shape)}" if value.ndim or value.is_meta else f"{dtype} {value.item():.4g}"
        )
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {describe(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple) and any(isinstance(entry, Tensor) for entry in value):
        return f"{type(value).__name__} of " + ", ".join(map(describe, value))
    shown = repr(value)
    return shown if len(shown) <= 60 else f"a {type(value).__name__}"


def numbers(tensor: Tensor, first: int = 0, n: int = 4) -> str:
    """A few numbers, rounded for reading: the first, or those from the place `first` of the flat tensor on."""
    flat = tensor.detach().reshape(-1)
    shown = ", ".join(f"{x:.4g}" for x in flat[first : first + n].tolist())
    at = f"at {[int(i) for i in torch.unravel_index(torch.tensor(first), tensor.shape)]} " if first else ""
    return f"{at}{shown}{', …' if flat.numel() > first + n else ''}"


def different_numbers(came: Tensor, expected: Tensor, *, rtol: float, atol: float) -> tuple[str, str]:
    """A few numbers of both, one of which isn't right: the first, or those from the first wrong one on.

    Shapes: both alike, with at least one number that differs by more than the tolerance.
    """
    wide = torch.promote_types(came.dtype, expected.dtype)
    same = torch.isclose(
        came.detach().to(wide), expected.detach().to(wide), rtol=rtol, atol=atol, equal_nan=True
    )
    first = int((~same).reshape(-1).nonzero()[0])
    first = 0 if numbers(came) != numbers(expected) else first
    return numbers(came, first), numbers(expected, first)


def draw(*shape: int, seed: int) -> Tensor:
    """Normal numbers, the same on every machine."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fresh(inputs: Mapping[str, Any], gradients: Sequence[str] = ()) -> dict[str, Any]:
    """A copy of the inputs that shares nothing with them; tensors named in `gradients` are leaves that want one.

    One deep copy of all together: what is tied in the inputs stays tied in the copy.
    """
    copies = copy.deepcopy({name: _plain(value) for name, value in inputs.items()})
    for name in gradients:
        copies[name].requires_grad_()
    return copies


def _plain(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name, leaf) of a nested value, in order: `[0]`, `['loss']`; a module's leaves are its parameters and buffers."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from leaves(entry, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, entry in enumerate(value):
            yield from leaves(entry, f"{name}[{i}]")
    elif isinstance(value, nn.Module):
        for key, entry in value.state_dict(keep_vars=True).items():
            yield f"{name}.{key}".lstrip("."), entry
    else:
        yield name, value


def close(came: Any, expected: Any, *, rtol: float = RTOL, atol: float = ATOL) -> bool:
    """Whether two values have the same leaves: shape, and numbers within the tolerance; dtype is not looked at.

    NaN is close to NaN, so that a mistake that gives some can be named.
    """
    ours, theirs = list(leaves(came)), list(leaves(expected))
    if [name for name, _ in ours] != [name for name, _ in theirs]:
        return False
    return all(_close(a, b, rtol, atol) for (_, a), (_, b) in zip(ours, theirs, strict=True))


def _close(came: Any, expected: Any, rtol: float, atol: float) -> bool:
    if isinstance(expected, int | float) and isinstance(came, Tensor) and came.ndim == 0:
        came = came.item()
    if isinstance(expected, float) and isinstance(came, float | int):
        came, expected = torch.tensor(float(came)), torch.tensor(expected)
    if isinstance(expected, Tensor):
        if not isinstance(came, Tensor) or came.shape != expected.shape:
            return False
        wide = torch.promote_types(came.dtype, expected.dtype)
        came, expected = came.detach().to(wide), expected.detach().to(wide)
        return torch.allclose(came, expected, rtol=rtol, atol=atol, equal_nan=True)
    return type(came) is type(expected) and bool(came == expected)
