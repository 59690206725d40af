"""LoTR: one pair of thin matrices for all layers, and a small square matrix for each.

    ΔW_l = s · L M_l R          L (out, r), R (r, in), M_l (r, r);  s = lora_alpha / r

Seen as a tensor of all ΔW_l, this is a Tucker decomposition that leaves the layers' own dimension as it is. Layers of
another size have a pair of their own.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.added import Shared
from pefttutor.parts.freezing import fully_trained
from pefttutor.parts.linear import sizes
from pefttutor.parts.lowrank_layer import Factored
from pefttutor.parts.lowrank_targets import add_lowrank, check_lowrank, lowrank_targets
from pefttutor.parts.weight_delta import beside

__all__ = ["LoTR"]

MIDDLE = "lotr_M"


def _shared_keys(n_in: int, n_out: int) -> tuple[str, str]:
    """What L and R of layers of this size are called in the model."""
    return f"lotr_L_{n_out}x{n_in}", f"lotr_R_{n_out}x{n_in}"


@dataclass(frozen=True, kw_only=True)
class LoTR:
    """Low tensor rank adaptation of linear layers and GPT-2's Conv1D.

    y = x W₀ᵀ + b + s · drop(x) Rᵀ M_lᵀ Lᵀ,   s = lora_alpha / r

    >>> model = nn.ModuleDict({"q_proj": nn.Linear(6, 4), "v_proj": nn.Linear(6, 4)})
    >>> LoTR(r=2).count(model)                                        # 2 · (6 + 4) once, and twice 2²
    28

    r, lora_alpha, target_modules, lora_dropout, modules_to_save, init_seed: as in LoRA.

    L and R start normal and each M at zero, so at first M alone gets a gradient. L and R lie in the model itself, under
    names that tell the size they are for.

    Shapes: L (out, r), R (r, in), M (r, r).
    Cost: it trains r · (in + out) values for each size of layers and r² for each layer (`count`). A token takes
        2·r·(in + out) FLOPs more, none once merged.
    Raises: ValueError for a value that makes no sense, before anything is changed.
    Source: Bershatsky et al. 2024, arXiv:2402.01376.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | Collection[str] = ("q_proj", "v_proj")
    lora_dropout: float = 0.0
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_lowrank(self)

    @property
    def scaling(self) -> float:
        """The factor s of L M R."""
        return self.lora_alpha / self.r

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, give it L and R and its target modules their M, and return it.

        Raises: ValueError if the name is in use, a module doesn't exist, or a layer can't be adapted or is smaller
            than r. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            generator = torch.Generator().manual_seed(self.init_seed)
            placed: dict[str, Tensor] = {}
            for (n_in, n_out), layer in self._first_of_each_size(model).items():
                keys, shapes = _shared_keys(n_in, n_out), ((n_out, self.r), (self.r, n_in))
                drawn = {
                    key: nn.Parameter(torch.empty(shape, device="cpu").normal_(generator=generator))
                    for key, shape in zip(keys, shapes, strict=True)
                }
                placed |= beside(layer, drawn)
            shared = Shared(model, name, placed)
            new.add(shared)
            add_lowrank(new, model, self._zeros, Between, words=False, shared=shared)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: r · (in + out) a size, r² a target, and modules_to_save."""
        shared = sum(self.r * (n_in + n_out) for n_in, n_out in self._first_of_each_size(model))
        layers = len(lowrank_targets(model, self, words=False))
        fully, _ = fully_trained(model, self.modules_to_save)
        return shared + self.r**2 * layers + sum(model.get_parameter(name).numel() for name in fully)

    def _first_of_each_size(self, model: nn.Module) -> dict[tuple[int, int], nn.Module]:
        found: dict[tuple[int, int], nn.Module] = {}
        for layer in lowrank_targets(model, self, words=False).values():
            found.setdefault(sizes(layer), layer)
        return found

    def _zeros(self, layer: nn.Module) -> dict[str, Tensor]:
        return {MIDDLE: nn.Parameter(torch.zeros(self.r, self.r))}


class Between(Factored):
    """y = f(x) + s · drop(x) Rᵀ Mᵀ Lᵀ, with L and R of all layers of this size."""

    def __init__(
        self,
        path: str,
        layer: nn.Module,
        name: str,
        tensors: dict[str, Tensor],
        *,
        shared: Shared,
        **how: float,
    ) -> None:
        """shared: L and R of every size."""
        super().__init__(path, layer, name, tensors, **how)
        self.shared, self.keys, self.r = shared, _shared_keys(*sizes(layer)), len(tensors[MIDDLE])

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """R (r, in) and L M (out, r)."""
        M = self.held(MIDDLE)
        L, R = self.shared.get(*self.keys, device=M.device)
        return R, L @ M

    def trace(self, layer: nn.Module, x: Any, tape: Any, kind: str) -> Any:
        """What LoRA keeps, and L M."""
        if layer is self.layer:
            tape.trains(*self.shared.get(*self.keys, device=self.held(MIDDLE).device))
        return super().trace(layer, x, tape, kind)
