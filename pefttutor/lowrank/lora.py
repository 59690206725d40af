"""LoRA: freeze the weights, learn a low-rank change of some of them.

    h = W₀ x + ΔW x = W₀ x + s · B A x          s = lora_alpha / r

A (r, in) starts random and B (out, r) at zero, so the adapted model starts as the base model. Afterwards s · B A
can be added to W₀, and inference costs nothing extra.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.lowrank_layer import draw_factors
from pefttutor.parts.lowrank_targets import add_lowrank, check_lowrank, count_lowrank, scaling_of

__all__ = ["LoRA"]


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adaptation of linear layers, embeddings and GPT-2's Conv1D.

    y = x W₀ᵀ + b + s · drop(x) Aᵀ Bᵀ,   s = lora_alpha / r   (use_rslora: lora_alpha / √r)

    >>> model = nn.ModuleDict({"q_proj": nn.Linear(6, 4)})
    >>> LoRA(r=2, target_modules=("q_proj",)).count(model)          # 2 · (6 + 4)
    20

    r: rank of the change. lora_alpha: its strength; raising r alone lowers s, which acts like a smaller
        learning rate (use_rslora lowers it less).
    target_modules: names, or their last parts, or one regular expression (a string) for the whole name, or
        "all-linear" for every linear layer but the output head.
    lora_dropout: probability on the low-rank branch in training; costs a mask and a copy of x in every layer.
    modules_to_save: modules that train fully and are saved along, such as a new head ("score", "classifier").
        A weight tied to another layer's trains for both.
    init_seed: fixes the random factors, whatever the device.

    Shapes: A (r, in), B (out, r). For an embedding "in" is the vocabulary, A starts at zero and B is normal.
    Cost: it trains r · (in + out) values a layer (`count`), and takes 2·r·(in + out) FLOPs more a token, none once
        merged.
    Raises: ValueError for a value that makes no sense, before anything is changed.
    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3; chapter eq. 4.10. rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
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
            add_lowrank(new, model, partial(draw_factors, r=self.r, generator=generator))
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: Σ r · (in + out) over the targets, and modules_to_save."""
        return count_lowrank(model, self, lambda n_in, n_out: self.r * (n_in + n_out))
