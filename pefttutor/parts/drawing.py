"""Random numbers that can be drawn again by anybody, at any time: a published function of a key and a place.

torch promises the same numbers for a seed only within one release. What is not stored but drawn again, because a seed
is shorter than a matrix, has to be the same bits years later and on another machine, else a file would silently
mean another model. The counter-based generator Philox-4x64-10 is such a function, and numpy keeps its raw output fixed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["drawn_again"]


def drawn_again(shape: tuple[int, ...], key: int, *, stream: int = 0) -> Tensor:
    """Numbers uniform in [0, 1), in float32 on the CPU: the multiples of 2⁻²⁴, exactly.

    >>> drawn_again((3,), key=0)
    tensor([0.0115, 0.2415, 0.1114])

    stream: another one has other numbers of the same key.

    Cost: 8 bytes a number for a moment.
    Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3.
    """
    raw = np.random.Philox(key=key, counter=stream << 192).random_raw(math.prod(shape))
    return torch.from_numpy((raw >> np.uint64(40)).astype(np.float32)).mul_(2.0**-24).view(shape)
