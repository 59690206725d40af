"""DoRA: learn how long each row of a weight is, apart from where it points.

    W' = m ⊙ (W₀ + ΔW) / ‖W₀ + ΔW‖          ΔW = s · B A,  s = lora_alpha / r;  m (out) starts as ‖W₀‖

The norm ‖·‖ is that of a row of W (out, in): one for each output unit. (The paper draws W as (in, out) and so speaks of
columns.) W₀ + ΔW, which is as large as the weight, never exists as a whole (`kernels.row_norms`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor.kernels.row_norms import row_norms
from pefttutor.kernels.scaled import scaled
from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.layer_change import Compute
from pefttutor.parts.linear import dense_weight
from pefttutor.parts.lowrank_layer import LowRank, draw_factors
from pefttutor.parts.lowrank_targets import add_lowrank, check_lowrank, count_lowrank, scaling_of
from pefttutor.parts.settings import check_choice

__all__ = ["DoRA"]

MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True, kw_only=True)
class DoRA:
    """Weight-decomposed low-rank adaptation of linear layers, embeddings and GPT-2's Conv1D.

    y = c ⊙ (x (W₀ + ΔW)ᵀ) + b,   c = m / ‖W₀ + ΔW‖;   with dropout: x W₀ᵀ + drop(x) (c ⊙ (W₀ + ΔW) − W₀)ᵀ + b

    >>> model = nn.ModuleDict({"q_proj": nn.Linear(6, 4)})
    >>> DoRA(r=2, target_modules=("q_proj",)).count(model)          # 2 · (6 + 4) + 4
    24

    r, lora_alpha, target_modules, modules_to_save, init_seed: as in LoRA.
    lora_dropout: in training the base's own output sees all of x, and what is learned sees drop(x).
    detach_norm: whether ‖W₀ + ΔW‖ is a constant for the gradient, as the paper advises (4.3) and the authors' code and
        HF PEFT have it; it saves memory. False takes the exact gradient.
    use_rslora: s = lora_alpha / √r.

    The bias is left as it is. A row of zeros has no direction, and stays zero. Another attachment's change of the same
    layer, made before, belongs to W₀ here: its norm counts.

    Shapes: A (r, in), B (out, r), m (out).
    Cost: it trains r · (in + out) + out values a layer (`count`), and takes (2·r + 1)·in·out FLOPs a call for the norm
        beside LoRA's; nothing once merged. It keeps one tensor as large as the output more than LoRA does.
    Raises: ValueError for a value that makes no sense, before anything is changed.
    Source: Liu et al. 2024, arXiv:2402.09353, eq. 5 and section 4.3. (Another method of that name, arXiv:2405.17357,
        distributes ranks.)
    """

    r: int = 8
    lora_alpha: float = 16
    target_modules: str | Collection[str] = ("q_proj", "v_proj")
    lora_dropout: float = 0.0
    detach_norm: bool = True
    use_rslora: bool = False
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_lowrank(self)
        check_choice(self, "detach_norm", (True, False))

    @property
    def scaling(self) -> float:
        """The factor s of B A: lora_alpha / r, or lora_alpha / √r with `use_rslora`."""
        return scaling_of(self)

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, give its target modules the two factors and the magnitude, and return it.

        Raises: ValueError if the name is in use, a module doesn't exist, or a layer can't be adapted, is smaller than
            r, or can't tell its weight. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            generator = torch.Generator().manual_seed(self.init_seed)
            factors = partial(draw_factors, r=self.r, generator=generator)
            add_lowrank(new, model, factors, Decomposed, detach_norm=self.detach_norm)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: Σ r · (in + out) + out over the targets, and modules_to_save."""
        return count_lowrank(model, self, lambda n_in, n_out: self.r * (n_in + n_out) + n_out)


class Decomposed(LowRank):
    """y = u + (c − 1) ⊙ (u − b),   u = x (W + s B A)ᵀ + b,   c = m / ‖W + s B A‖

    At the start c is 1, so y is f(x) to the last bit. W is the layer's own weight, with what other changes have made of
    it before.
    """

    additive = False
    stored = False

    def __init__(
        self,
        path: str,
        layer: nn.Module,
        name: str,
        factors: tuple[Tensor, Tensor],
        *,
        detach_norm: bool,
        **how: float,
    ) -> None:
        self.detach_norm = detach_norm
        weight = dense_weight(layer)
        beside = {MAGNITUDE: nn.Parameter(weight.new_empty(len(weight)))}
        super().__init__(path, layer, name, factors, beside=beside, **how)  # type: ignore[arg-type]
        with torch.no_grad():  # in the same way as later, so that c is 1 to the last bit
            weight, _ = self.beneath()
            self.held(MAGNITUDE).copy_(row_norms(weight, *self.factors, self.scaling))

    def ratio(self, weight: Tensor) -> Tensor:
        """c = m / ‖W + s B A‖. Shapes: (out, in) → (out)."""
        A, B = self.factors
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm):
            norm = row_norms(weight, A, B, self.scaling).clamp_min(torch.finfo(A.dtype).tiny)
        return self.held(MAGNITUDE) / norm

    def forward(self, inner: Compute, own: bool, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight, bias = self.beneath()
        ratio = self.ratio(weight)  # (out)
        if not self.drops:
            y = super().forward(inner, own, x, *args, **kwargs)  # u
            if bias is None:
                return scaled(y, ratio).to(y.dtype)
            v = y - bias.to(y.dtype)
        else:
            A, B = self.factors
            y, z = inner(x, *args, **kwargs), F.dropout(x, self.dropout)
            low_rank = self.scaling * self.branch(z, A, B)
            v = F.linear(z, weight.to(x.dtype)) + low_rank  # (…, out)
            y = y + low_rank.to(y.dtype)
        return torch.addcmul(y, v, ratio - 1).to(y.dtype)  # rounded once

    def delta(self) -> Tensor:
        """ΔW = c ⊙ (W + s B A) − W, at least in float32. Shapes: → (out, in)."""
        weight, _ = self.beneath()
        return self.folded_into(weight.to(self.factors[0].dtype), None)[0] - weight

    def folded_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        changed = weight + super().delta().to(weight.dtype)
        return self.ratio(weight).to(weight.dtype).unsqueeze(1) * changed, bias

    def trace(self, layer: nn.Module, x: Any, tape: Any, kind: str) -> Any:
        """What LoRA keeps, u − b, and some numbers for each output, of which the norm is made."""
        y = super().trace(layer, x, tape, kind)
        if y is None:
            return None
        n_out, size = len(self.factors[1]), self.factors[1].element_size()
        learns = tape.trains(*self.trained())
        if learns:
            tape.save(y.like(), kind)
        # c, and the norm, also as it is before it is kept from zero; of a frozen one c, for what flows on
        for _ in range((2 if self.detach_norm else 3) if learns else y.grad):
            tape.save(y.like(rows=n_out, width=1, itemsize=size), kind)
        return y
