"""MiLoRA: LoRA that starts at the directions in which a weight is weakest.

    W₀ = U S Vᵀ          s · B₀ A₀ = U_m S_m V_mᵀ,  of the r smallest singular values

What trains is B A in the place of B₀ A₀. The principal part of W₀, which holds most of what the model knows, is frozen;
PiSSA does the opposite.

    W' = (W₀ − s · B₀ A₀) + s · B A = W₀ + s · (B A − B₀ A₀)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.from_start import FromStart, factors_of
from pefttutor.parts.lowrank_targets import add_lowrank, check_lowrank, count_lowrank

__all__ = ["MiLoRA"]


@dataclass(frozen=True, kw_only=True)
class MiLoRA:
    """Minor singular component adaptation of linear layers, embeddings and GPT-2's Conv1D.

    y = x W₀ᵀ + b + s · (drop(x) Aᵀ Bᵀ − x A₀ᵀ B₀ᵀ),   s = lora_alpha / r

    >>> model = nn.ModuleDict({"q_proj": nn.Linear(6, 4)})
    >>> MiLoRA(r=2, target_modules=("q_proj",)).count(model)          # 2 · (6 + 4), as LoRA's
    20

    r, lora_alpha, target_modules, lora_dropout, modules_to_save: as in LoRA. The authors take lora_alpha = r = 64.

    As in PiSSA, the base keeps its own weight, bit for bit, the start is subtracted beside it and lies in adapter
    files, and as a change of W₀ what was learned has a rank of up to 2·r.

    Shapes: A (r, in), B (out, r), and their starts.
    Cost: it trains r · (in + out) values a layer (`count`), and holds as many again. A token takes 4·r·(in + out) FLOPs
        more, none once merged; attaching takes one decomposition a layer.
    Raises: ValueError for a value that makes no sense, before anything is changed.
    Source: Wang et al. 2024, arXiv:2406.09044, section 3.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | Collection[str] = ("q_proj", "v_proj")
    lora_dropout: float = 0.0
    modules_to_save: Collection[str] = ()

    def __post_init__(self) -> None:
        check_lowrank(self, seed=None)

    @property
    def scaling(self) -> float:
        """The factor s of B A."""
        return self.lora_alpha / self.r

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, decompose the weights of its target modules, and return it.

        Raises: ValueError if the name is in use, a module doesn't exist, or a layer can't be adapted, is smaller than
            r, can't tell its weight, or has r singular values of zero. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            add_lowrank(
                new,
                model,
                lambda layer: factors_of(layer, slice(-self.r, None), self.scaling),
                FromStart,
            )
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: Σ r · (in + out) over the targets, and modules_to_save."""
        return count_lowrank(model, self, lambda n_in, n_out: self.r * (n_in + n_out))
