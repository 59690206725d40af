"""LoHa: the element-wise product of two low-rank matrices, whose rank can be the square of theirs.

    ΔW = s · (B₁ A₁) ⊙ (B₂ A₂)          s = alpha / r,  rank ≤ r²

With as many values as LoRA of rank 2·r has, the change can have rank r². Neither of the two matrices is ever formed,
for their product has thin factors itself: row by row the Kronecker product of B₁ and B₂, and column by column that of
A₁ and A₂:

    (B₁ A₁) ⊙ (B₂ A₂) = B A          A (r², in), B (out, r²)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.linear import sizes
from pefttutor.parts.lowrank_layer import Factored, as_in_linear
from pefttutor.parts.lowrank_targets import add_lowrank, check_lowrank, count_lowrank

__all__ = ["LoHa", "hadamard_factors"]

KEYS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")  # B₁, A₁, B₂, A₂


def hadamard_factors(B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor) -> tuple[Tensor, Tensor]:
    """A and B with B A = (B₁ A₁) ⊙ (B₂ A₂).

    >>> B1, A1, B2, A2 = (torch.tensor([[number]]) for number in (2.0, 3.0, 5.0, 7.0))
    >>> hadamard_factors(B1, A1, B2, A2)                        # 6 · 35 = 10 · 21
    (tensor([[21.]]), tensor([[10.]]))

    Shapes: (out, r), (r, in), twice → (r², in), (out, r²). Cost: r² · (in + out) products.
    """
    A = (A1[:, None, :] * A2[None, :, :]).flatten(0, 1)  # (r, r, in) → (r², in)
    B = (B1[:, :, None] * B2[:, None, :]).flatten(1, 2)  # (out, r, r) → (out, r²)
    return A, B


@dataclass(frozen=True, kw_only=True)
class LoHa:
    """Low-rank Hadamard product adaptation of linear layers and GPT-2's Conv1D.

    y = x W₀ᵀ + b + s · x ((B₁ A₁) ⊙ (B₂ A₂))ᵀ,   s = alpha / r

    >>> model = nn.ModuleDict({"q_proj": nn.Linear(6, 4)})
    >>> LoHa(r=2, target_modules=("q_proj",)).count(model)          # 2 · 2 · (6 + 4)
    40

    r: rank of each of the two matrices. alpha: the strength of the change.
    target_modules, modules_to_save, init_seed: as in LoRA.

    A₂ starts at zero, the others as the weight of an `nn.Linear`, as in HF PEFT; LyCORIS draws them normal.

    Shapes: B₁, B₂ (out, r), called `hada_w1_a` and `hada_w2_a`; A₁, A₂ (r, in), called `hada_w1_b` and `hada_w2_b`.
    Cost: it trains 2·r · (in + out) values a layer (`count`). A step forms the r² · (in + out) values of A and B, and
        a token takes 2·r²·(in + out) FLOPs more, none once merged: r² well below in and out makes it cheaper than ΔW.
    Raises: ValueError for a value that makes no sense, before anything is changed.
    Source: Yeh et al. 2023, arXiv:2309.14859, section 3; FedPara: Hyeon-Woo et al. 2022, arXiv:2108.06098.
    """

    r: int = 8
    alpha: float = 8
    target_modules: str | Collection[str] = ("q_proj", "v_proj")
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_lowrank(self, alpha="alpha", dropout=None)

    @property
    def scaling(self) -> float:
        """The factor s of the product."""
        return self.alpha / self.r

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, give its target modules the four factors, and return it.

        Raises: ValueError if the name is in use, a module doesn't exist, or a layer can't be adapted or is smaller
            than r. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            generator = torch.Generator().manual_seed(self.init_seed)
            add_lowrank(new, model, partial(self._drawn, generator=generator), Hadamard, words=False)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: Σ 2·r · (in + out) over the targets, and modules_to_save."""
        return count_lowrank(model, self, lambda n_in, n_out: 2 * self.r * (n_in + n_out), words=False)

    def _drawn(self, layer: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        n_in, n_out = sizes(layer)
        drawn = [as_in_linear(shape, generator) for shape in 2 * ((n_out, self.r), (self.r, n_in))]
        drawn[-1].zero_()
        return {key: nn.Parameter(factor) for key, factor in zip(KEYS, drawn, strict=True)}


class Hadamard(Factored):
    """y = f(x) + s · x Aᵀ Bᵀ with A and B made of four."""

    def __init__(
        self, path: str, layer: nn.Module, name: str, tensors: dict[str, Tensor], **how: float
    ) -> None:
        super().__init__(path, layer, name, tensors, **how)
        self.r = len(tensors["hada_w1_b"]) ** 2

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r², in) and B (out, r²)."""
        return hadamard_factors(*map(self.held, KEYS))
