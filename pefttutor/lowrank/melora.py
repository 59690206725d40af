"""MELoRA: several small LoRAs beside each other, each for a share of the features, make one of a high rank.

    ΔW = s · diag(B₁ A₁, …, B_n A_n)          B_i (out / n, r), A_i (r, in / n);  s = lora_alpha / r

n blocks of rank r have the rank n · r together, and as many values as a single LoRA of rank r.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.linear import sizes
from pefttutor.parts.lowrank_layer import as_in_linear
from pefttutor.parts.lowrank_targets import add_lowrank, check_lowrank, count_lowrank, lowrank_targets
from pefttutor.parts.settings import check_whole
from pefttutor.parts.weight_delta import WeightDelta

__all__ = ["MELoRA"]

A_KEY, B_KEY = "melora_A", "melora_B"


@dataclass(frozen=True, kw_only=True)
class MELoRA:
    """Mini-ensemble low-rank adaptation of linear layers and GPT-2's Conv1D.

    y_i = (x W₀ᵀ + b)_i + s · drop(x)_i A_iᵀ B_iᵀ for the i-th of n shares of the features,   s = lora_alpha / r

    >>> model = nn.ModuleDict({"q_proj": nn.Linear(6, 4)})
    >>> MELoRA(r=1, n=2, target_modules=("q_proj",)).count(model)          # 2 · (3 + 2), as LoRA's of rank 1
    10

    r: rank of each small LoRA. n: how many there are; it must divide the sizes of every target.
    lora_alpha, target_modules, lora_dropout, modules_to_save, init_seed: as in LoRA.

    An output share sees the input's share of the same number alone.

    Shapes: A (n, r, in / n), B (n, out / n, r).
    Cost: it trains r · (in + out) values a layer (`count`) for a rank of n · r, and takes 2·r·(in + out) FLOPs more a
        token, none once merged.
    Raises: ValueError for a value that makes no sense, before anything is changed.
    Source: Ren et al. 2024, arXiv:2402.17263, section 3.
    """

    r: int = 8
    n: int = 2
    lora_alpha: float = 16
    target_modules: str | Collection[str] = ("q_proj", "v_proj")
    lora_dropout: float = 0.0
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_lowrank(self)
        check_whole(self, "n")

    @property
    def scaling(self) -> float:
        """The factor s of each B A."""
        return self.lora_alpha / self.r

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, give its target modules the small factors, and return it.

        Raises: ValueError if the name is in use, a module doesn't exist, or a layer can't be adapted, or has sizes that
            n doesn't divide or shares smaller than r. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            self._check(model)
            generator = torch.Generator().manual_seed(self.init_seed)
            drawn = partial(self._drawn, generator=generator)
            add_lowrank(new, model, drawn, Blocks, rank=None, words=False)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: Σ r · (in + out) over the targets, and modules_to_save."""
        self._check(model)
        return count_lowrank(model, self, lambda n_in, n_out: self.r * (n_in + n_out), rank=None, words=False)

    def _check(self, model: nn.Module) -> None:
        for path, layer in lowrank_targets(model, self, rank=None, words=False).items():
            n_in, n_out = sizes(layer)
            if (shared := math.gcd(n_in, n_out)) % self.n:
                choices = [str(n) for n in range(1, shared + 1) if shared % n == 0]
                raise ValueError(
                    f"n is {self.n}, which doesn't divide both sizes of {path!r}, which maps {n_in} to {n_out}: take "
                    f"one of {', '.join(choices)}."
                )
            if self.r > (least := min(n_in, n_out) // self.n):
                raise ValueError(
                    f"r is {self.r}, but each of n = {self.n} shares of {path!r} maps {n_in // self.n} to "
                    f"{n_out // self.n}: r must be at most {least}."
                )

    def _drawn(self, layer: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        n_in, n_out = (size // self.n for size in sizes(layer))
        A = torch.stack([as_in_linear((self.r, n_in), generator) for _ in range(self.n)])
        return {A_KEY: nn.Parameter(A), B_KEY: nn.Parameter(torch.zeros(self.n, n_out, self.r))}


class Blocks(WeightDelta):
    """y_i = f(x)_i + s · drop(x)_i A_iᵀ B_iᵀ for each of n shares of the features."""

    def product(self, x: Tensor) -> Tensor:
        A, B = (self.held(key).to(x.dtype) for key in (A_KEY, B_KEY))
        shares = x.unflatten(-1, (len(A), -1))  # (…, n, in / n)
        narrow = torch.einsum("...ni,nri->...nr", shares, A)
        return torch.einsum("...nr,nor->...no", narrow, B).flatten(-2)  # (…, n, out / n) → (…, out)

    def delta(self) -> Tensor:
        """ΔW = s · diag(B₁ A₁, …), at least in float32. Shapes: → (out, in)."""
        A, B = (self.held(key) for key in (A_KEY, B_KEY))
        return self.scaling * torch.block_diag(*(B @ A).to(torch.promote_types(A.dtype, torch.float32)))
