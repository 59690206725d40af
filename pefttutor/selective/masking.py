"""Masking: the weights stay; what is learnt is which of them count.

    Ŵ = W₀ ⊙ 1[S > τ]          ∂L/∂S := ∂L/∂Ŵ ⊙ W₀     (straight through the step)

It prunes: a weight that isn't chosen becomes 0, rather than staying as it was.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.method import DEFAULT, attached, attaching
from pefttutor.parts.attachment import added_key
from pefttutor.parts.called import check_called
from pefttutor.parts.freezing import fully_trained, train_fully
from pefttutor.parts.modules import find_modules
from pefttutor.parts.settings import check_fraction, check_names, check_number, check_whole
from pefttutor.parts.shadow import Shadowed

__all__ = ["Masking", "packed_masks"]

SCORES = "_scores"
LOW = -0.02  # the lowest score at the start


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Learn a binary mask over frozen weights, by real scores and a straight-through gradient.

    >>> model = Masking(target_modules=("0",)).attach(nn.Sequential(nn.Linear(3, 2)))
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['0.weight_scores']

    target_modules: the modules whose weights are masked: names, their last parts, or a regular expression.
    init_sparsity: share of the weights that start at 0. Scores are drawn from U(−0.02, b), with b so that this share
        is below the threshold.
    threshold: τ, above which a score keeps its weight.
    modules_to_save: modules that train fully and are saved along, such as a new head ("classifier").
    init_seed: fixes the scores, whatever the device.

    Shapes: the scores S have the shape of their weight.
    Cost: it trains as many scores as there are weights; the result is 1 bit a weight (`packed_masks`).
    Raises: ValueError for an init_sparsity outside (0, 1] or targets that don't exist, have no weight, or train fully.
    Source: Zhao et al. 2020, arXiv:2004.12406, eq. 3 and 4; chapter 4.3.2.
    """

    target_modules: str | Collection[str] = ("query", "key", "value", "dense")
    init_sparsity: float = 0.05
    threshold: float = 0.01
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_fraction(self, "init_sparsity")
        check_number(self, "threshold", above=LOW)
        check_whole(self, "init_seed", least=0)
        check_names(self, "target_modules", "modules_to_save")

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, give its target weights scores, and return it. Raises: ValueError if the name is in use."""
        with attaching(model, self, name) as new:
            weights = self._weights(model)
            generator = torch.Generator().manual_seed(self.init_seed)
            high = (self.threshold - LOW) / self.init_sparsity + LOW
            for weight_name, weight in weights.items():
                key = added_key(weight_name.rpartition(".")[2] + SCORES, name)
                drawn = torch.rand(weight.shape, generator=generator) * (high - LOW) + LOW
                # At least float32: in half precision most scores would be too large to move by a step.
                scores = nn.Parameter(
                    drawn.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
                )
                new.add(Shadowed(model, weight_name, name, Masked(key, self.threshold), {key: scores}))
            for part in train_fully(model, (), self.modules_to_save):
                new.add(part)
        return model

    def _weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights to mask, by their name. Raises: ValueError where there is none."""
        fully = fully_trained(model, self.modules_to_save)[0]
        names = {id(p): name for name, p in model.named_parameters()}
        weights = {}
        for path, layer in find_modules(model, self.target_modules).items():
            weight = getattr(layer, "weight", None)
            if not isinstance(weight, Tensor):
                inside = [p for child in layer.children() for p in child.parameters()]
                raise ValueError(
                    f"target_modules: {path!r} is a {type(layer).__name__}, without a weight of its own; "
                    f"{'name the layers inside it' if inside else 'Masking needs one called weight'}."
                )
            if id(weight) not in names:
                raise ValueError(
                    f"target_modules: {path!r} makes its weight anew at each call (is it pruned or normalised?), so "
                    "nothing can be masked there."
                )
            if names[id(weight)] not in fully:
                weights[names[id(weight)]] = weight
        check_called(model, weights)
        if not weights:
            raise ValueError(
                f"target_modules {self.target_modules!r} all train fully as modules_to_save, so nothing is masked; "
                "name them in one of the two."
            )
        return weights


def packed_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks at 1 bit a weight, by the name of the weight: all that has to be stored.

    >>> model = Masking(target_modules=("0",)).attach(nn.Sequential(nn.Linear(5, 4)))
    >>> packed_masks(model)["0.weight"].shape                           # 20 weights in 3 bytes
    torch.Size([3])

    Shapes: → (⌈n / 8⌉) uint8, the first weight in the lowest bit.
    """
    packed = {}
    for attachment in attached(model).values():
        for part in attachment.parts:
            if isinstance(part, Shadowed) and isinstance(part.make, Masked):
                (scores,) = part.trained()
                bits = (scores > part.make.threshold).flatten()
                bits = nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
                powers = torch.arange(8, dtype=torch.uint8, device=bits.device)
                packed[part.weight_name] = (bits << powers).sum(1, dtype=torch.uint8)
    return packed


@dataclass(frozen=True)
class Masked:
    """In a weight's place: the weight where its score is above the threshold, else 0."""

    scores: str
    threshold: float

    def __call__(self, layer: nn.Module, key: str, weight: Tensor) -> Tensor:
        return _StraightThrough.apply(layer.get_parameter(self.scores), weight, self.threshold)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, weight: Tensor, threshold: float) -> Tensor:
        mask = scores > threshold
        ctx.save_for_backward(weight, mask if weight.requires_grad else None)
        ctx.dtype = scores.dtype
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, mask = ctx.saved_tensors
        return (grad * weight).to(ctx.dtype), None if mask is None else grad * mask, None
