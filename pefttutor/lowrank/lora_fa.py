"""LoRA-FA: LoRA whose first factor stays as it was drawn.

    W' = W₀ + s · B A,   A frozen at random, B trained from zero;   s = lora_alpha / r

The gradient of B needs x Aᵀ (r numbers a token), and nobody needs x (in numbers) any more: that is what is saved.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.lowrank_layer import draw_factors
from pefttutor.parts.lowrank_targets import add_lowrank, check_lowrank, count_lowrank, scaling_of

__all__ = ["LoRAFA"]


@dataclass(frozen=True, kw_only=True)
class LoRAFA:
    """Low-rank adaptation with a frozen A, of linear layers, embeddings and GPT-2's Conv1D.

    y = x W₀ᵀ + b + s · drop(x) Aᵀ Bᵀ

    >>> model = nn.ModuleDict({"q_proj": nn.Linear(6, 4)})
    >>> LoRAFA(r=2, target_modules=("q_proj",)).count(model)          # 2 · 4
    8

    r, lora_alpha, target_modules, lora_dropout, use_rslora, modules_to_save, init_seed: as in LoRA.

    What can be learned lies in the r input directions that A has drawn. An adapter file holds A too, as a buffer. This
    is the paper's method; the optimizer of that name in HF PEFT also multiplies the gradient by (A Aᵀ)⁻¹ / s².

    Shapes: A (r, in), B (out, r).
    Cost: it trains r · out values a layer (`count`), and keeps r numbers a token and layer for the backward pass, where
        LoRA keeps in + r; with dropout a mask of x as well.
    Raises: ValueError for a value that makes no sense, before anything is changed.
    Source: Zhang et al. 2023, arXiv:2308.03303, eq. 3.
    """

    r: int = 8
    lora_alpha: float = 16
    target_modules: str | Collection[str] = ("q_proj", "v_proj")
    lora_dropout: float = 0.0
    use_rslora: bool = False
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_lowrank(self)

    @property
    def scaling(self) -> float:
        """The factor s of B A: lora_alpha / r, or lora_alpha / √r with `use_rslora`."""
        return scaling_of(self)

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, give its target modules the two factors, and return it.

        Raises: ValueError if the name is in use, a module doesn't exist, or a layer can't be adapted or is smaller
            than r. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            generator = torch.Generator().manual_seed(self.init_seed)
            add_lowrank(new, model, partial(self._drawn, generator=generator), train_A=False)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: Σ r · out over the targets, and modules_to_save."""
        return count_lowrank(model, self, lambda n_in, n_out: self.r * n_out)

    def _drawn(self, layer: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        A, B = draw_factors(layer, self.r, generator)
        if isinstance(layer, nn.Embedding):  # there LoRA's A starts at zero, and would stay there
            return A.normal_(generator=generator), torch.zeros_like(B)
        return A, B
