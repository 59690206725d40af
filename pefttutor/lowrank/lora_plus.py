"""LoRA+: LoRA whose second factor learns faster than the first.

    η_A = η,   η_B = λ η          λ = loraplus_lr_ratio

As a layer becomes wide, a step of A changes the output far more than one of the same length of B; with one rate for
both, B moves too little.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from pefttutor.method import DEFAULT, attached, attaching
from pefttutor.parts.lowrank_layer import LowRank, draw_factors
from pefttutor.parts.lowrank_targets import add_lowrank, check_lowrank, count_lowrank, scaling_of
from pefttutor.parts.settings import check_number

__all__ = ["LoRAPlus"]


@dataclass(frozen=True, kw_only=True)
class LoRAPlus:
    """Low-rank adaptation with a learning rate of its own for B. The model is LoRA's; the optimizer differs.

    >>> model = LoRAPlus(r=2, target_modules=("0",)).attach(nn.Sequential(nn.Linear(6, 4)))
    >>> optimizer = LoRAPlus(r=2, target_modules=("0",)).optimizer(model, lr=1e-4, weight_decay=0.0)
    >>> [(group["lr"], [tuple(p.shape) for p in group["params"]]) for group in optimizer.param_groups]
    [(0.0001, [(2, 6)]), (0.0016, [(4, 2)])]

    loraplus_lr_ratio: λ; the authors take 16 or so, with η some way below LoRA's best rate.
    r, lora_alpha, target_modules, lora_dropout, use_rslora, modules_to_save, init_seed: as in LoRA.

    `fit` asks for the optimizer by itself; give it to a Trainer with optimizers=(method.optimizer(…), None). What else
    trains, such as a new head, has the rate η, and so have both factors of an embedding, of which the paper says
    nothing. AdamW's decay is a share of each group's rate.

    Shapes: A (r, in), B (out, r).
    Cost: LoRA's.
    Raises: ValueError for a value that makes no sense, before anything is changed.
    Source: Hayou et al. 2024, arXiv:2402.12354, section 4.
    """

    r: int = 8
    lora_alpha: float = 16
    target_modules: str | Collection[str] = ("q_proj", "v_proj")
    lora_dropout: float = 0.0
    use_rslora: bool = False
    loraplus_lr_ratio: float = 16.0
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_lowrank(self)
        check_number(self, "loraplus_lr_ratio", above=0, hint=" (1 is LoRA; usual: 16)")

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

    def optimizer(self, model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """AdamW with the rate lr, and loraplus_lr_ratio times that for B of every linear layer."""
        parts = [part for a in attached(model).values() if a.method == self for part in a.parts]
        fast = {
            id(part.held("lora_B"))
            for part in parts
            if isinstance(part, LowRank) and not isinstance(part.layer, nn.Embedding)
        }
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if id(p) not in fast], "lr": lr},
            {"params": [p for p in trained if id(p) in fast], "lr": self.loraplus_lr_ratio * lr},
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=weight_decay)
