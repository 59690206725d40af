"""Choose the entries with the largest scores."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

__all__ = ["exact_share", "largest", "largest_share", "without_values"]


def largest(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """Masks of the k largest scores over all tensors together; ties are broken by position, so that k is exact.

    On the meta device, where nothing has a value, k places without one are shared out by the tensors' sizes:
    enough for `pefttutor.memory` to count with.
    """
    if without_values(scores):
        return _stand_ins(scores, k)
    flat = torch.cat([score.detach().flatten().float() for score in scores.values()])
    if flat.isnan().any():
        bad = [name for name, score in scores.items() if score.isnan().any()]
        raise FloatingPointError(f"the scores of {bad[0]!r} hold NaN; did the loss or a gradient overflow?")
    limit = flat.kthvalue(len(flat) - k + 1).values
    mask = flat > limit
    mask[(flat == limit).nonzero().squeeze(1)[: k - int(mask.sum())]] = True
    parts = mask.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def largest_share(scores: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """Masks of the ⌊fraction · n⌋ largest of n scores, but at least of one.

    >>> largest_share({"w": torch.tensor([3.0, 1.0, 2.0, 0.0])}, 0.5)["w"].tolist()
    [True, False, True, False]
    """
    n = sum(score.numel() for score in scores.values())
    return largest(scores, max(1, int(exact_share(fraction, n))))


def exact_share(fraction: float, n: int) -> Fraction:
    """fraction · n of the decimal number that was written: 29 for 0.29 of 100, whose float product is 28.999….."""
    return Fraction(str(fraction)) * n


def without_values(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are on the meta device, so that nothing can be chosen by what they hold."""
    return any(tensor.is_meta for tensor in tensors.values())


def _stand_ins(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """k flat places in all, as many in each tensor as its size asks for. Shapes: (k_i) each."""
    n, before, found = sum(score.numel() for score in scores.values()), 0, {}
    for name, score in scores.items():
        count = k * (before + score.numel()) // n - k * before // n
        found[name] = torch.empty(count, dtype=torch.int64, device="meta")
        before += score.numel()
    return found
