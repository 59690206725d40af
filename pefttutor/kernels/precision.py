"""In which precision a kernel computes: in that of PyTorch's own linear layer, also under autocast."""

from __future__ import annotations

import contextlib
from functools import cache

import torch
from torch import Tensor

__all__ = ["compute_dtype", "shared_dtype", "unrounded"]


def unrounded(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Within the block, autocast leaves what is computed on the tensor's device as precise as it is.

    >>> with torch.autocast("cpu", dtype=torch.bfloat16), unrounded(torch.ones(1)):
    ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
    torch.float32
    """
    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind):  # such as the meta device
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which PyTorch's own linear layer would take x: autocast's where that is on, else x's own.

    Autocast leaves float64 and integers alone. A tensor that has autocast's dtype already looks the same with
    autocast on and off: whether two tensors fit is asked of both (`shared_dtype`), never read from one.

    >>> with torch.autocast("cpu", dtype=torch.bfloat16):
    ...     compute_dtype(torch.ones(1)), compute_dtype(torch.ones(1).double())
    (torch.bfloat16, torch.float64)
    """
    dtype, kind = x.dtype, x.device.type
    if not _can_cast(kind) or not torch.is_autocast_enabled(kind):
        return dtype
    return torch.get_autocast_dtype(kind) if dtype.is_floating_point and dtype != torch.float64 else dtype


_can_cast = cache(torch.amp.is_autocast_available)  # asked in every call of every layer


def shared_dtype(kernel: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype in which the linear layer would take all of them. x is its input, weight and bias its parameters.

    >>> with torch.autocast("cpu", dtype=torch.bfloat16):
    ...     shared_dtype("mine", torch.ones(1), torch.ones(1).bfloat16(), None)
    torch.bfloat16

    Raises: TypeError where they would still differ, as PyTorch's own layer refuses them.
    """
    dtype = compute_dtype(x)
    for parameter in (weight, bias):
        if parameter is not None and parameter.dtype != x.dtype and compute_dtype(parameter) != dtype:
            bias_dtype = None if bias is None else bias.dtype
            raise TypeError(
                f"{kernel}: the input is {x.dtype}, weight {weight.dtype} and bias {bias_dtype}, expected what fits "
                f"{dtype}; convert one of them, or use torch.autocast (which leaves torch.float64 as it is)"
            )
    return dtype
