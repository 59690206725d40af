"""LayerNorm tuning: train the scale γ and shift β of the normalisations.

y = γ · x̂ + β          x̂ = (x − mean) / deviation;  RMSNorm has γ only
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.freezing import train_fully
from pefttutor.parts.norms import norm_parameters
from pefttutor.parts.settings import check_names

__all__ = ["LayerNormTuning"]


@dataclass(frozen=True, kw_only=True)
class LayerNormTuning:
    """Train γ and β of every LayerNorm and γ of every RMSNorm.

    >>> model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.RMSNorm(4))
    >>> LayerNormTuning().count(model)                                  # γ and β, then γ
    12

    modules_to_save: modules that train fully and are saved along, such as a new head ("classifier").

    Cost: it trains 2·d values for each LayerNorm and d for each RMSNorm (`count`). γ can be folded into the linear
        layer that follows: W ← W · diag(γ).
    Raises: ValueError on a model without normalisations.
    Source: Zhao et al. 2023, arXiv:2312.11420.
    """

    modules_to_save: Collection[str] = ()

    def __post_init__(self) -> None:
        check_names(self, "modules_to_save")

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model` but for its norms and return it. Raises: ValueError if the name is in use."""
        with attaching(model, self, name) as new:
            for part in train_fully(model, self._norms(model), self.modules_to_save):
                new.add(part)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values of norms train, without `modules_to_save`."""
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        return sum(sizes[name] for name in self._norms(model))

    def _norms(self, model: nn.Module) -> list[str]:
        names = norm_parameters(model)
        if not names:
            kinds = sorted({type(layer).__name__ for layer in model.modules()})
            raise ValueError(
                f"LayerNormTuning: no LayerNorm or RMSNorm with weights of its own among {', '.join(kinds)}."
            )
        return names
