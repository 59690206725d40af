"""SLTrain: a product of thin factors, and beside it a few single entries at places drawn by lot.

    ΔW = s · B A + S          s = lora_alpha / r,   S has a share `density` of its entries, the others are zero

The product reaches every entry and few directions; the entries reach few places and every direction. Together they
have nearly the full rank, for little more than the product's values.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.kernels.sparse_linear import sparse_linear
from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.layer_change import Compute
from pefttutor.parts.linear import sizes
from pefttutor.parts.lowrank_layer import LowRank, draw_factors
from pefttutor.parts.lowrank_targets import add_lowrank, check_lowrank, count_lowrank
from pefttutor.parts.settings import check_choice, check_fraction

__all__ = ["SLTrain"]

VALUES, PLACES = "sltrain_values", "sltrain_places"
STARTS = ("zeros", "uniform")


@dataclass(frozen=True, kw_only=True)
class SLTrain:
    """Sparse plus low-rank adaptation of linear layers and GPT-2's Conv1D.

    y = x W₀ᵀ + b + s · x Aᵀ Bᵀ + x Sᵀ,   s = lora_alpha / r

    >>> model = nn.ModuleDict({"q_proj": nn.Linear(20, 10)})
    >>> SLTrain(r=2, density=0.05, target_modules=("q_proj",)).count(model)          # 2 · (20 + 10) + 5 % of 200
    70

    r, lora_alpha, target_modules, modules_to_save, init_seed: as in LoRA.
    density: share of the entries of each weight that S has, at least one; `init_seed` draws their places, which stay.
    sparse_init: "zeros", so that the model starts as the base, or "uniform" in ±1/√in, as the paper draws S.

    The paper trains a model from nothing, *without* W₀: every weight is s · B A + S. This is that layer beside a
    pretrained weight. On weights that were set to zero before it is the paper's own, with sparse_init="uniform",
    lora_alpha 32, r 128 and density 0.03.

    Shapes: A (r, in), B (out, r), values (k), places (k) as whole numbers, k = ⌊density · in · out⌋.
    Cost: it trains r · (in + out) + k values a layer (`count`), and stores k places. A token takes 2·r·(in + out) +
        2·in·out FLOPs more, none once merged: a matrix this dense is multiplied as a whole. A step forms S twice
        in each layer, and keeps it nowhere.
    Raises: ValueError for a value that makes no sense, before anything is changed.
    Source: Han et al. 2024, arXiv:2406.02214, section 3. Beside a pretrained weight, with places chosen by gradients,
        it is RoSA: Nikdan et al. 2024, arXiv:2401.04679.
    """

    r: int = 8
    lora_alpha: float = 16
    density: float = 0.03
    target_modules: str | Collection[str] = ("q_proj", "v_proj")
    sparse_init: str = "zeros"
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_lowrank(self, dropout=None)
        check_fraction(self, "density")
        check_choice(self, "sparse_init", STARTS)

    @property
    def scaling(self) -> float:
        """The factor s of B A."""
        return self.lora_alpha / self.r

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, give its target modules the two factors and the entries of S, and return it.

        Raises: ValueError if the name is in use, a module doesn't exist, or a layer can't be adapted or is smaller
            than r. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            generator = torch.Generator().manual_seed(self.init_seed)
            add_lowrank(new, model, partial(self._drawn, generator=generator), WithEntries, words=False)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: Σ r · (in + out) + k over the targets, and modules_to_save."""
        return count_lowrank(
            model, self, lambda n_in, n_out: self.r * (n_in + n_out) + self._k(n_in, n_out), words=False
        )

    def _k(self, n_in: int, n_out: int) -> int:
        return max(1, int(self.density * n_in * n_out))

    def _drawn(self, layer: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, B, the places of S in rising order, and its values."""
        n_in, n_out = sizes(layer)
        A, B = draw_factors(layer, self.r, generator)
        places = torch.randperm(n_in * n_out, generator=generator, device="cpu")[: self._k(n_in, n_out)]
        places = places.sort().values.to(torch.int32 if n_in * n_out < 2**31 else torch.int64)
        values = torch.zeros(len(places), device="cpu")
        if self.sparse_init == "uniform":
            values.uniform_(-(n_in**-0.5), n_in**-0.5, generator=generator)
        return A, B, places, values


class WithEntries(LowRank):
    """y = f(x) + s · x Aᵀ Bᵀ + x Sᵀ"""

    stored = False

    def __init__(
        self, path: str, layer: nn.Module, name: str, drawn: tuple[Tensor, Tensor, Tensor, Tensor], **how: Any
    ) -> None:
        """drawn: A, B, the places of S, and its values."""
        A, B, places, values = drawn
        beside = {VALUES: nn.Parameter(values), PLACES: places}
        super().__init__(path, layer, name, (A, B), beside=beside, **how)
        self.n_out = len(B)

    def forward(self, inner: Compute, own: bool, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = super().forward(inner, own, x, *args, **kwargs)
        return y + sparse_linear(x, self.held(VALUES), self.held(PLACES), self.n_out).to(y.dtype)

    def delta(self) -> Tensor:
        """ΔW = s · B A + S, at least in float32. Shapes: → (out, in)."""
        low = super().delta()
        return low.flatten().index_add(0, self.held(PLACES), self.held(VALUES).to(low.dtype)).view_as(low)
