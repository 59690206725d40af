"""Choose the entries with the largest scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_fraction", "largest"]


def largest(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """Masks of the k largest scores over all tensors together; ties are broken by position, so that k is exact."""
    flat = torch.cat([score.detach().flatten().float() for score in scores.values()])
    if flat.isnan().any():
        bad = [name for name, score in scores.items() if score.isnan().any()]
        raise FloatingPointError(f"the scores of {bad[0]!r} hold NaN; did the loss or a gradient overflow?")
    limit = flat.kthvalue(len(flat) - k + 1).values
    mask = flat > limit
    mask[(flat == limit).nonzero().squeeze(1)[: k - int(mask.sum())]] = True
    parts = mask.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def check_fraction(method: Any, name: str = "fraction") -> None:
    """Raise ValueError unless the field is a number in (0, 1]."""
    value = getattr(method, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{name} is {value!r}; it must be in (0, 1], such as 0.005 for half a percent.")
