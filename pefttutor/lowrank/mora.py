"""MoRA: as many values as LoRA has, in one square matrix, whose rank is not bounded by r.

    ΔW x = decompress(M compress(x))          M (r̂, r̂),  r̂ = ⌊√((in + out) · r) + ½⌋

Nothing but M is learned: how x becomes r̂ numbers, and how r̂ numbers become the output, is fixed. For both, the features
are cut into groups of r̂, the last of which is filled up from the front. Type 1 adds the groups up, and repeats M's
answer for every group of the output. Type 6 tells groups apart: it turns the i-th by angles i · θ, as rotary positions
are, and M's answers to the single groups come one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.linear import sizes
from pefttutor.parts.lowrank_targets import add_lowrank, check_lowrank, count_lowrank, lowrank_targets
from pefttutor.parts.settings import check_choice
from pefttutor.parts.weight_delta import WeightDelta

__all__ = ["MoRA", "turned"]

KEY = "mora_M"
SHARED, ROTATED = 1, 6


def turned(groups: Tensor) -> Tensor:
    """Turn the i-th group by the angles i · 10000^(−2k / r̂): its k-th number with the (k + r̂/2)-th.

    >>> turned(torch.tensor([[1.0, 0.0], [1.0, 0.0]])).round(decimals=2)             # the second by 1 radian
    tensor([[1.0000, 0.0000],
            [0.5400, 0.8400]])

    Shapes: (…, groups, r̂) → (…, groups, r̂). Source: Jiang et al. 2024, section 3.
    """
    count, width = groups.shape[-2:]
    wide = torch.promote_types(groups.dtype, torch.float32)
    speeds = 10000.0 ** (torch.arange(0, width, 2, device=groups.device, dtype=wide) / -width)
    angles = torch.outer(torch.arange(count, device=groups.device, dtype=wide), speeds)
    cos, sin = angles.cos().to(groups.dtype), angles.sin().to(groups.dtype)
    first, second = groups.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@dataclass(frozen=True, kw_only=True)
class MoRA:
    """High-rank updating of linear layers and GPT-2's Conv1D with a square matrix.

    y = x W₀ᵀ + b + decompress(compress(drop(x)) Mᵀ)

    >>> model = nn.ModuleDict({"q_proj": nn.Linear(24, 24)})
    >>> MoRA(r=3, target_modules=("q_proj",)).count(model)          # 12², as LoRA's 3 · 48
    144

    r: M gets about as many values as LoRA of this rank has. There is no lora_alpha.
    mora_type: 1, which shares M between groups of features, and whose change has a rank of up to r̂; or 6, which turns
        each group and whose change can have the full rank. For 6, r̂ is rounded down to an even number.
    target_modules, lora_dropout, modules_to_save: as in LoRA.

    M starts at zero, and gets a gradient all the same.

    Shapes: M (r̂, r̂).
    Cost: it trains r̂² ≈ r · (in + out) values a layer (`count`). A token takes 2·r̂² FLOPs more with type 1, and
        2·r̂·in with type 6; none once merged.
    Raises: ValueError for a value that makes no sense, before anything is changed.
    Source: Jiang et al. 2024, arXiv:2405.12130, section 3; the types are numbered as in the authors' code.
    """

    r: int = 8
    mora_type: int = ROTATED
    target_modules: str | Collection[str] = ("q_proj", "v_proj")
    lora_dropout: float = 0.0
    modules_to_save: Collection[str] = ()

    def __post_init__(self) -> None:
        check_lowrank(self, alpha=None, seed=None)
        check_choice(self, "mora_type", (SHARED, ROTATED))

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, give its target modules their M, and return it.

        Raises: ValueError if the name is in use, a module doesn't exist, or a layer can't be adapted or is smaller
            than r̂. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            self._check(model)
            add_lowrank(
                new, model, self._zeros, Square, rank=None, words=False, rotated=self.mora_type == ROTATED
            )
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: Σ r̂² over the targets, and modules_to_save."""
        self._check(model)
        return count_lowrank(model, self, lambda *size: self.width(*size) ** 2, rank=None, words=False)

    def width(self, n_in: int, n_out: int) -> int:
        """r̂ of a layer.

        >>> MoRA(r=2).width(24, 12), MoRA(r=8).width(4096, 4096)
        (8, 256)
        """
        width = int(math.sqrt((n_in + n_out) * self.r) + 0.5)
        return width // 2 * 2 if self.mora_type == ROTATED else width

    def _check(self, model: nn.Module) -> None:
        for path, layer in lowrank_targets(model, self, rank=None, words=False).items():
            n_in, n_out = sizes(layer)
            if (width := self.width(n_in, n_out)) > min(n_in, n_out):
                raise ValueError(
                    f"r is {self.r}, which makes M {width} wide, but {path!r} maps {n_in} to {n_out}, and some of M "
                    "would never be used: take a smaller r."
                )

    def _zeros(self, layer: nn.Module) -> dict[str, Tensor]:
        width = self.width(*sizes(layer))
        return {KEY: nn.Parameter(torch.zeros(width, width))}


class Square(WeightDelta):
    """y = f(x) + decompress(compress(drop(x)) Mᵀ)"""

    def __init__(
        self,
        path: str,
        layer: nn.Module,
        name: str,
        tensors: dict[str, Tensor],
        *,
        rotated: bool,
        **how: float,
    ) -> None:
        super().__init__(path, layer, name, tensors, **how)
        self.rotated, self.shape = rotated, sizes(layer)

    def product(self, x: Tensor) -> Tensor:
        M, (n_in, n_out) = self.held(KEY).to(x.dtype), self.shape
        width = len(M)
        filled = torch.cat([x, x[..., : -n_in % width]], -1)
        groups = filled.unflatten(-1, (-1, width))  # (…, groups, r̂)
        answers = F.linear(turned(groups), M).flatten(-2) if self.rotated else F.linear(groups.sum(-2), M)
        times = -(-n_out // answers.shape[-1])
        return torch.cat([answers] * times, -1)[..., :n_out]

    def delta(self) -> Tensor:
        """ΔW, of the answers to the unit vectors; at least in float32. Shapes: → (out, in)."""
        M = self.held(KEY)
        wide = torch.promote_types(M.dtype, torch.float32)
        return self.product(torch.eye(self.shape[0], device=M.device, dtype=wide)).t()
