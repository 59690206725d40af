"""From a mask to the flat places of its entries, checked against the tensor they are for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pefttutor.kernels.flat_entries import sorted_places

__all__ = ["places"]


def places(parameters: Mapping[str, Tensor], name: str, mask: Tensor) -> Tensor:
    """The flat places of a boolean mask, or of places as they are, sorted. On the meta device there is nothing to sort.

    Whole numbers are always places, never a mask of 0 and 1.

    Shapes: mask the parameter's, or places (k) → (k), int32 where that is enough.
    Raises: ValueError if they don't fit the parameter `name`, or its memory isn't contiguous.
    """
    if name not in parameters:
        shown = ", ".join(list(parameters)[:6])
        raise ValueError(f"a mask is for {name!r}, which this model doesn't have; it has {shown}, …")
    weight = parameters[name]
    if not weight.is_contiguous():
        raise ValueError(
            f"{name!r} {tuple(weight.shape)} isn't contiguous, so its entries have no flat places; "
            "make it so first: p.data = p.data.contiguous()"
        )
    if mask.dtype == torch.bool:
        if mask.shape != weight.shape:
            raise ValueError(
                f"the mask of {name!r} is {tuple(mask.shape)}, expected the weight's {tuple(weight.shape)}: "
                "was it made for another model?"
            )
        mask = mask.flatten().nonzero().squeeze(1)
    elif mask.dtype not in (torch.int32, torch.int64) or mask.dim() != 1:
        raise ValueError(
            f"the mask of {name!r} is {tuple(mask.shape)} of {mask.dtype}; expected booleans, true where an entry "
            "trains: mask.bool()"
        )
    return _checked(weight, name, mask).to(torch.int32 if weight.numel() < 2**31 else torch.int64)


def _checked(weight: Tensor, name: str, index: Tensor) -> Tensor:
    """The places in rising order, on the weight's device."""
    index = index.to(weight.device)
    if weight.is_meta:
        return index
    try:
        return sorted_places(index, weight)
    except ValueError as error:
        raise ValueError(
            f"the places given for {name!r} aren't some of its {weight.numel()} entries: {error}. "
            "Whole numbers are places; a mask of 0 and 1 is written mask.bool()."
        ) from None
