"""Masking: the weights stay; what is learnt is which of them count.

    Ŵ = W₀ ⊙ 1[S > τ]          ∂L/∂S := ∂L/∂Ŵ ⊙ W₀     (straight through the step)

It prunes: a weight that isn't chosen becomes 0, rather than staying as it was.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor import method as base
from pefttutor.parts import entries
from pefttutor.parts.shadow import check_called, owners, shadow

__all__ = ["Masking", "packed_masks"]

SCORES = "_scores"
LOW = -0.02  # the lowest score at the start


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Learn a binary mask over frozen weights, by real scores and a straight-through gradient.

    target_modules: whose weights are masked: names, their last parts, or a regular expression.
    init_sparsity: share of the weights that start at 0. Scores start in U(−0.02, b) with b so that this share is
        below the threshold.
    threshold: τ.
    modules_to_save: modules that train fully and are saved along, such as a new head ("classifier").
    init_seed: of the scores.

    Cost: trains as many scores as there are weights; the result is 1 bit a weight (`packed_masks`).
    Raises: ValueError for an init_sparsity outside (0, 1] or targets that don't exist, have no weight, or train fully.
    Source: Zhao et al. 2020, arXiv:2004.12406, eq. 3 and 4; chapter 4.3.2.
    """

    target_modules: str | Collection[str] = ("query", "key", "value", "dense")
    init_sparsity: float = 0.05
    threshold: float = 0.01
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        entries.check_fraction(self, "init_sparsity")

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze `model`, give its target weights scores, and return it. Raises: RuntimeError if adapted already."""
        base.refuse_adapted(model)
        targets = base.find_modules(model, self.target_modules)
        whole = set(entries.candidates(model)) - set(entries.candidates(model, self.modules_to_save))
        weights = self._weights(targets, whole)
        check_called(model, [f"{name}.weight" for name in weights])
        generator = torch.Generator().manual_seed(self.init_seed)
        high = (self.threshold - LOW) / self.init_sparsity + LOW
        base.freeze(model)
        for name, p in model.named_parameters():
            p.requires_grad_(name in whole)
        for weight in weights.values():
            drawn = torch.rand(weight.shape, generator=generator) * (high - LOW) + LOW
            scores = nn.Parameter(drawn.to(weight))
            for layer, key in owners(model, weight):
                layer.register_parameter(key + SCORES, scores)
                vars(layer)["_threshold"] = self.threshold
                shadow(layer, key, _masked)
        return base.mark(model, self)

    def _weights(self, targets: Mapping[str, nn.Module], whole: Collection[str]) -> dict[str, Tensor]:
        """The weights to mask, by the name of their layer. Raises: ValueError where there is none."""
        weights = {}
        for name, layer in targets.items():
            weight = getattr(layer, "weight", None)
            if not isinstance(weight, Tensor):
                raise ValueError(
                    f"target_modules: {name!r} is a {type(layer).__name__}, without a weight of its own; "
                    "name the layers inside it."
                )
            if f"{name}.weight" not in whole:
                weights[name] = weight
        if not weights:
            raise ValueError(
                f"target_modules {self.target_modules!r} all train fully as modules_to_save, so nothing is masked; "
                "name them in one of the two."
            )
        return weights


def packed_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks at 1 bit a weight, by the name of the weight: all that has to be stored.

    Shapes: → (⌈n / 8⌉) uint8, the first weight in the lowest bit.
    """
    found = {}
    for prefix, layer in model.named_modules():
        for key, make in vars(layer).get("_shadows", {}).items():
            if make is _masked:
                bits = (layer.get_parameter(key + SCORES) > vars(layer)["_threshold"]).flatten()
                bits = nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
                found[f"{prefix}.{key}"] = (bits << torch.arange(8, dtype=torch.uint8)).sum(
                    1, dtype=torch.uint8
                )
    return found


def _masked(layer: nn.Module, key: str) -> Tensor:
    return _StraightThrough.apply(
        layer.get_parameter(key + SCORES), layer._parameters[key], vars(layer)["_threshold"]
    )


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, weight: Tensor, threshold: float) -> Tensor:
        ctx.save_for_backward(weight)
        return weight * (scores > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return grad * weight, None, None
