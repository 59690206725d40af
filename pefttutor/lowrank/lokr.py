"""LoKr: the change is a Kronecker product of a small matrix and a low-rank one; KronA where both are whole.

    ΔW = s · W₁ ⊗ W₂          s = alpha / r,  W₁ (a₁, b₁), W₂ (a₂, b₂),  out = a₁ · a₂, in = b₁ · b₂

The product's rank is that of W₁ times that of W₂, so few values can reach a high rank. It is never formed:

    (W₁ ⊗ W₂) vec(X) = vec(W₁ X W₂ᵀ)          X (b₁, b₂) are the features of a token, row by row
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.attachment import added_key
from pefttutor.parts.linear import sizes
from pefttutor.parts.lowrank_layer import as_in_linear
from pefttutor.parts.lowrank_targets import add_lowrank, check_lowrank, count_lowrank, lowrank_targets
from pefttutor.parts.settings import check_choice
from pefttutor.parts.weight_delta import WeightDelta

__all__ = ["LoKr", "factorised"]

SQUARE = -1  # decompose_factor: as square as can be


def factorised(size: int, factor: int = SQUARE) -> tuple[int, int]:
    """Two whole numbers whose product is `size`, the first of them the factor, or the largest up to √size.

    >>> factorised(768), factorised(768, 8), factorised(127)
    ((24, 32), (8, 96), (1, 127))

    Raises: ValueError for a factor that doesn't divide it.
    """
    if factor == SQUARE:
        factor = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    if size % factor:
        raise ValueError(f"{factor} doesn't divide {size}")
    return factor, size // factor


@dataclass(frozen=True, kw_only=True)
class LoKr:
    """Low-rank Kronecker product adaptation of linear layers and GPT-2's Conv1D.

    y = x W₀ᵀ + b + s · vec(W₁ X W₂ᵀ),   s = alpha / r

    >>> model = nn.ModuleDict({"q_proj": nn.Linear(768, 768)})
    >>> [LoKr(r=r, target_modules=("q_proj",)).count(model) for r in (8, 16)]      # 24² + 2 · 8 · 32, and 24² + 32²
    [1088, 1600]

    r: rank of W₂, which is whole where r ≥ max(a₂, b₂) / 2; KronA is LoKr with a large r. alpha: the strength of the
        change; s is alpha / r also where r has become nothing but that.
    decompose_factor: a₁ and b₁; −1 takes the most square factors of out and in. One that doesn't divide both is
        refused (HF PEFT and LyCORIS silently take another).
    decompose_both: whether W₁ has rank r as well, where r < max(a₁, b₁) / 2.
    target_modules, modules_to_save, init_seed: as in LoRA.

    W₁ starts at zero, or its left factor, and the others as the weight of an `nn.Linear`, as in HF PEFT; in LyCORIS W₂
    starts at zero.

    Shapes: W₁ (a₁, b₁) is `lokr_w1`, or the product of `lokr_w1_a` (a₁, r) and `lokr_w1_b` (r, b₁); W₂ likewise.
    Cost: it trains a₁ b₁ + r · (a₂ + b₂) values a layer (`count`), or a₂ b₂ in the place of the second term. A token
        takes 2·in·a₁ + 2·a₁ a₂ b₂ FLOPs more, or with rank r 2·a₁ r (a₂ + b₂) in the place of the second; none merged.
    Raises: ValueError for a value that makes no sense, before anything is changed.
    Source: Yeh et al. 2023, arXiv:2309.14859, section 3; KronA: Edalati et al. 2022, arXiv:2212.10650.
    """

    r: int = 8
    alpha: float = 8
    target_modules: str | Collection[str] = ("q_proj", "v_proj")
    decompose_both: bool = False
    decompose_factor: int = SQUARE
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_lowrank(self, alpha="alpha", dropout=None)
        check_choice(self, "decompose_both", (True, False))
        whole = isinstance(self.decompose_factor, int) and not isinstance(self.decompose_factor, bool)
        if not whole or (self.decompose_factor < 1 and self.decompose_factor != SQUARE):
            raise ValueError(
                f"decompose_factor is {self.decompose_factor!r}; it must be a whole number ≥ 1, or -1 for the most "
                "square factors."
            )

    @property
    def scaling(self) -> float:
        """The factor s of the product."""
        return self.alpha / self.r

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, give its target modules the factors, and return it.

        Raises: ValueError if the name is in use, a module doesn't exist, or a layer can't be adapted or has sizes that
            decompose_factor doesn't divide. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            self._check(model)
            generator = torch.Generator().manual_seed(self.init_seed)
            drawn = partial(self._drawn, generator=generator)
            add_lowrank(new, model, drawn, Kronecker, rank=None, words=False)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: those of W₁ and W₂ over the targets, and modules_to_save."""
        self._check(model)
        return count_lowrank(model, self, self._values, rank=None, words=False)

    def _check(self, model: nn.Module) -> None:
        for path, layer in lowrank_targets(model, self, rank=None, words=False).items():
            n_in, n_out = sizes(layer)
            if self.decompose_factor != SQUARE and math.gcd(n_in, n_out) % self.decompose_factor:
                shared = math.gcd(n_in, n_out)
                choices = [str(n) for n in range(1, shared + 1) if shared % n == 0]
                raise ValueError(
                    f"decompose_factor is {self.decompose_factor}, which doesn't divide both sizes of {path!r}, which "
                    f"maps {n_in} to {n_out}: take one of {', '.join(choices)}, or -1."
                )

    def _shapes(self, n_in: int, n_out: int) -> dict[str, tuple[int, int]]:
        """The tensors of a layer; of a product, the left factor comes first."""
        columns, rows = (factorised(size, self.decompose_factor) for size in (n_in, n_out))
        shapes: dict[str, tuple[int, int]] = {}
        for i, (a, b) in enumerate(zip(rows, columns, strict=True), 1):
            whole = self.r >= max(a, b) / 2 or (i == 1 and not self.decompose_both)
            shapes |= (
                {f"lokr_w{i}": (a, b)}
                if whole
                else {f"lokr_w{i}_a": (a, self.r), f"lokr_w{i}_b": (self.r, b)}
            )
        return shapes

    def _values(self, n_in: int, n_out: int) -> int:
        return sum(rows * columns for rows, columns in self._shapes(n_in, n_out).values())

    def _drawn(self, layer: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        drawn = {key: as_in_linear(shape, generator) for key, shape in self._shapes(*sizes(layer)).items()}
        next(iter(drawn.values())).zero_()
        return {key: nn.Parameter(tensor) for key, tensor in drawn.items()}


class Kronecker(WeightDelta):
    """y = f(x) + s · vec(W₁ X W₂ᵀ)"""

    def matrices(self, i: int) -> list[Tensor]:
        """W₁ or W₂, whole or as two factors, the one that is applied first in front."""
        keys = [f"lokr_w{i}", f"lokr_w{i}_b", f"lokr_w{i}_a"]
        return [self.held(key) for key in keys if added_key(key, self.name) in self.added_keys]

    def product(self, x: Tensor) -> Tensor:
        first, second = self.matrices(1), self.matrices(2)
        X = x.unflatten(-1, (first[0].shape[1], second[0].shape[1])).transpose(-1, -2)  # (…, b₂, b₁)
        for matrix in first:
            X = F.linear(X, matrix.to(x.dtype))
        X = X.transpose(-1, -2)  # (…, a₁, b₂)
        for matrix in second:
            X = F.linear(X, matrix.to(x.dtype))
        return X.flatten(-2)  # (…, a₁, a₂) → (…, out)

    def delta(self) -> Tensor:
        """ΔW = s · W₁ ⊗ W₂, at least in float32. Shapes: → (out, in)."""
        wide = torch.promote_types(self.trained()[0].dtype, torch.float32)
        both = [[matrix.to(wide) for matrix in reversed(self.matrices(i))] for i in (1, 2)]
        return self.scaling * torch.kron(*(reduce(torch.matmul, matrices) for matrices in both))
