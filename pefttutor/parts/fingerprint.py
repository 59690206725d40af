"""Tell one base model from another without reading all of it: names, shapes, and a few values of every tensor."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["check_base", "checksum", "describe_base", "problems"]

SAMPLES = 8  # values of every tensor; two bases that were trained apart differ in nearly all of them


def describe_base(model: nn.Module, without: Collection[str]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and a few values of every parameter and saved buffer of `model`, except those named in `without`.

    >>> describe_base(nn.Linear(2, 1, bias=False), without=())["weight"]["shape"]
    [1, 2]

    Cost: SAMPLES values a tensor are read, whatever its size.
    """
    persistent = model.state_dict().keys()
    parameters = {name: p.detach() for name, p in model.named_parameters() if name not in without}
    buffers = {n: b for n, b in model.named_buffers() if n not in without and n in persistent}
    described = {
        name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), "values": _sample(t)}
        for name, t in (parameters | buffers).items()
    }
    return described | {name: described[name] | {"buffer": True} for name in buffers}


def check_base(actual: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]]) -> None:
    """Raise ValueError, with what differs, unless `actual` describes the base that `expected` does.

    The values may differ by what rounding to the coarser of the two dtypes explains, so an adapter trained on a
    float32 base fits the same base in bfloat16.
    """
    found = problems(actual, expected)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"the adapter was trained on another base model. In this one {'; '.join(found[:3])}{more}. "
            "Load the base it was trained on (a head with fresh random weights belongs in modules_to_save)."
        )


def problems(actual: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]]) -> list[str]:
    """What differs, a phrase for each tensor: other names and shapes, or else other values.

    >>> one, other = (describe_base(nn.Linear(2, 1, bias=False), without=()) for _ in range(2))
    >>> problems(one, one), problems(one, other)
    ([], ['weight has other values'])
    """
    shared = [(name, expected[name], actual[name]) for name in expected if name in actual]
    found = [f"{name} is missing" for name in expected if name not in actual]
    extra = [name for name in actual if name not in expected and "buffer" not in actual[name]]
    found += [f"{name} is too much" for name in extra]  # files of before didn't describe buffers
    shapes = [(name, was["shape"], now["shape"]) for name, was, now in shared]
    found += [f"{name} has the shape {now}, not {was}" for name, was, now in shapes if now != was]
    return found or [f"{name} has other values" for name, was, now in shared if not _close(was, now)]


def checksum(tensor: Tensor) -> tuple[str, int] | None:
    """The dtype, and the sum of all values read as whole numbers: a step that changes a value changes it.

    0 for zeros; None on the meta device.

    >>> checksum(torch.zeros(3)), checksum(torch.tensor([1e-9]))
    (('float32', 0), ('float32', 814313567))

    Cost: one pass over the tensor. The same on every device.
    """
    if tensor.is_meta:
        return None
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.int64)
    bits = tensor.detach().flatten().view(whole)
    return str(tensor.dtype).removeprefix("torch."), int(bits.sum(dtype=torch.int64))


def _sample(tensor: Tensor) -> list[float]:
    """SAMPLES values at fixed places, from the first to the last."""
    if tensor.is_meta:
        raise ValueError("this model has no weights yet (it is on the meta device): load them first.")
    if tensor.numel() == 0:
        return []
    places = torch.linspace(0, tensor.numel() - 1, SAMPLES, dtype=torch.float64).round().long()
    if not tensor.dim():
        return [tensor.float().item()]
    index: list[Tensor] = []
    for size in reversed(tensor.shape):  # flattening could copy the tensor; torch.unravel_index imports sympy
        index.insert(0, (places % size).to(tensor.device))
        places = places // size
    return tensor[tuple(index)].float().tolist()


def _close(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Equal up to rounding to the coarser of the two dtypes; equal at all if they are the same."""
    a, b = torch.tensor(one["values"]), torch.tensor(other["values"])
    if one["dtype"] == other["dtype"]:
        return torch.equal(a, b)
    kinds = [getattr(torch, description["dtype"], torch.float32) for description in (one, other)]
    limits = [torch.finfo(kind) for kind in kinds if kind.is_floating_point]
    rtol = max((limit.eps for limit in limits), default=0.0)
    smallest = max((limit.smallest_normal for limit in limits), default=0.0)
    return torch.allclose(a, b, rtol=rtol, atol=smallest * rtol)
