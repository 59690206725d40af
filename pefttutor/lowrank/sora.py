"""SoRA: LoRA whose rank falls out of training, for a gate on each direction is pulled to zero and may get there.

    ΔW = s · B diag(g) A          s = lora_alpha / r

After each step of the optimizer the gate takes a proximal step of the penalty λ ‖g‖₁, which moves every value by λ
towards zero and lets it stop there:

    g ← argmin_z ½ ‖z − g‖² + λ ‖z‖₁ = sign(g) · max(|g| − λ, 0)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor.method import DEFAULT, attaching, attachments_of, learning
from pefttutor.parts.added import NO_STEP, step_counter, steps_of
from pefttutor.parts.lowrank_layer import LowRank, draw_factors
from pefttutor.parts.lowrank_targets import add_lowrank, check_lowrank, count_lowrank
from pefttutor.parts.part import of_kind
from pefttutor.parts.settings import check_number

__all__ = ["SoRA", "soft_threshold"]

COUNTER, GATE = "sora_step", "lora_gate"


def soft_threshold(values: Tensor, by: float) -> Tensor:
    """sign(v) · max(|v| − by, 0): the proximal operator of by · |v|.

    >>> soft_threshold(torch.tensor([-3.0, 0.5, 1.0, 4.0]), by=1.0)
    tensor([-2.,  0.,  0.,  3.])
    """
    return F.softshrink(values, by)


@dataclass(frozen=True, kw_only=True)
class SoRA:
    """Sparse low-rank adaptation of linear layers and GPT-2's Conv1D: each layer ends with the rank that it needs.

    y = x W₀ᵀ + b + s · ((drop(x) Aᵀ) ⊙ g) Bᵀ,   s = lora_alpha / r

    >>> model = SoRA(r=3, target_modules=("0",)).attach(nn.Sequential(nn.Linear(6, 4)))
    >>> _ = model[0].lora_gate.data.copy_(torch.tensor([[2.0], [0.0], [-1.0]]))
    >>> SoRA(r=3, target_modules=("0",)).ranks(model)
    {'0': 2}

    r: the rank at first, called r_max in the paper. sparse_lambda_2: λ, by which a step pulls every gate to zero; the
        paper raises it from one training to the next. It isn't multiplied by the learning rate.
    sparse_lambda: also adds sparse_lambda · mean |g| to the loss, as the released scripts do (with 10).
    lora_alpha, target_modules, lora_dropout, modules_to_save, init_seed: as in LoRA.

    g starts normal and B at zero. (The released code subtracts λ and then zeroes what is below λ, so that everything
    below 2 λ is lost; here it is the operator above.) A gate of zero has a gradient, and may open again.

    Shapes: A (r, in), g (r, 1), B (out, r).
    Cost: it trains r · (in + out + 1) values a layer (`count`), of which those of closed gates needn't be kept in the
        end; a step forms diag(g) A; nothing once merged.
    Raises: ValueError for a value that makes no sense, before anything is changed.
    Source: Ding et al. 2023, arXiv:2311.11696, section 3.
    """

    r: int = 8
    lora_alpha: float = 16
    target_modules: str | Collection[str] = ("q_proj", "v_proj")
    lora_dropout: float = 0.0
    sparse_lambda: float = 0.0
    sparse_lambda_2: float = 3e-4
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_lowrank(self)
        for name in ("sparse_lambda", "sparse_lambda_2"):
            check_number(self, name, least=0)

    @property
    def scaling(self) -> float:
        """The factor s of B diag(g) A."""
        return self.lora_alpha / self.r

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, give its target modules the two factors and the gate, and return it.

        Raises: ValueError if the name is in use, a module doesn't exist, or a layer can't be adapted or is smaller
            than r. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            generator = torch.Generator().manual_seed(self.init_seed)
            factors = partial(draw_factors, r=self.r, generator=generator)
            add_lowrank(new, model, factors, Gated, words=False, generator=generator)
            new.add(step_counter(model, COUNTER, name))
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: Σ r · (in + out + 1) over the targets, and modules_to_save."""
        return count_lowrank(model, self, lambda n_in, n_out: self.r * (n_in + n_out + 1), words=False)

    def ranks(self, model: nn.Module) -> dict[str, int]:
        """How many gates of each layer are open, by its name in the model."""
        return {part.path: int(part.gate.count_nonzero()) for part in self._gated(model)}

    def penalty(self, model: nn.Module) -> Tensor:
        """What is added to the loss: sparse_lambda · mean |g| over all gates."""
        gates = [part.gate.abs().flatten() for part in self._gated(model, learning=True)]
        if not gates or not self.sparse_lambda:
            return torch.zeros((), requires_grad=True)
        return self.sparse_lambda * torch.cat(gates).mean()

    def after_step(self, model: nn.Module, step: int) -> None:
        """The proximal step of every gate."""
        with torch.no_grad():
            for part in self._gated(model, learning=True):
                part.gate.copy_(soft_threshold(part.gate, self.sparse_lambda_2))
        for attachment in learning(model, self):
            counter = steps_of(model, COUNTER, attachment.name)
            counter += 1

    def unfinished(self, model: nn.Module) -> str | None:
        """Whether gates were pulled to zero at all."""
        never = [a for a in learning(model, self) if not int(steps_of(model, COUNTER, a.name))]
        return f"no gate was pulled to zero, for {NO_STEP}" if never else None

    def _gated(self, model: nn.Module, *, learning: bool = False) -> list[Gated]:
        mine = [a for a in attachments_of(model, self) if a.learns or not learning]
        return [part for a in mine for part in of_kind(a.parts, Gated)]


class Gated(LowRank):
    """y = f(x) + s · ((drop(x) Aᵀ) ⊙ g) Bᵀ"""

    stored = False

    def __init__(
        self,
        path: str,
        layer: nn.Module,
        name: str,
        factors: tuple[Tensor, Tensor],
        *,
        generator: torch.Generator,
        **how: Any,
    ) -> None:
        gate = torch.empty(len(factors[0]), 1, device="cpu").normal_(generator=generator)
        super().__init__(path, layer, name, factors, beside={GATE: nn.Parameter(gate)}, **how)

    @property
    def gate(self) -> Tensor:
        """g (r, 1)."""
        return self.held(GATE)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """diag(g) A (r, in) and B (out, r)."""
        A, B = super().factors
        return self.gate * A, B
