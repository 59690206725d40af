"""In which precision a kernel computes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compute_dtype"]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which PyTorch's own linear layer would take x: autocast's where that is on, else x's own."""
    device = x.device.type
    known = device in ("cpu", "cuda")  # elsewhere (meta, …) autocast can't be asked
    if known and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
