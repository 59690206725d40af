"""How much the loss depends on each triplet of an attachment's layers, learnt from step to step: AdaLoRA's importance.

    Ī ← β₁ Ī + (1 − β₁) I,   Ū ← β₂ Ū + (1 − β₂) |I − Ī|,   I = |w ∂L/∂w|

A value w counts as much as Ī · Ū, a triplet as the sum of its λ's and the means over its row of Q and column of P.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pefttutor.parts.added import Shared
from pefttutor.parts.triplets import Triplets

__all__ = ["Importances"]

IMPORTANCE = "lora_importance"


class Importances(Shared):
    """Ī and Ū of all values of several layers in one buffer of the model, so that a step is a few passes over it.

    Layers of one shape lie together: first the λ of all, then Q, then P.

    Shapes: (2, Σ r · (in + out + 1)). Cost: two values for each that trains; adapter files leave them out.
    """

    def __init__(self, model: nn.Module, name: str, layers: Sequence[Triplets]) -> None:
        """layers: of one rank, in the order in which `scores` names their triplets."""
        self.layers, self.r = layers, layers[0].r
        self.shapes: dict[tuple[int, int], list[int]] = {}  # of (in, out) the places of its layers
        for place, layer in enumerate(layers):
            _, Q, P = layer.triplets
            self.shapes.setdefault((Q.shape[1], len(P)), []).append(place)
        values = self.values
        start = values[0].new_zeros(2, sum(value.numel() for value in values))
        super().__init__(model, name, {IMPORTANCE: start.detach()}, stored=False)

    @property
    def values(self) -> list[Tensor]:
        """λ, Q and P of all layers, in the order of the buffer."""
        triplets = [layer.triplets for layer in self.layers]
        return [triplets[i][kind] for places in self.shapes.values() for kind in range(3) for i in places]

    @torch.no_grad()
    def learn(self, beta1: float, beta2: float) -> None:
        """The gradients of a step are there: average how sensitive the loss was. One that got none counts nothing."""
        sensitivity, uncertainty = self.added()[0]
        values, now = self.values, torch.empty_like(sensitivity)
        for value, room in zip(values, now.split([value.numel() for value in values]), strict=True):
            if (grad := value.grad) is None:
                room.zero_()
            elif value.device == room.device:
                torch.mul(value, grad, out=room.view_as(value))
            else:
                room.view_as(value).copy_(value * grad)
        sensitivity.lerp_(now.abs_(), 1 - beta1)
        uncertainty.lerp_(now.sub_(sensitivity).abs_(), 1 - beta2)

    def scores(self) -> Tensor:
        """How much each triplet of each layer counts. Shapes: → (layers · r)."""
        counts, r, start = self.added()[0].prod(0), self.r, 0
        found = counts.new_empty(len(self.layers), r)
        for (n_in, n_out), places in self.shapes.items():
            k = len(places)
            sizes = [k * r, k * r * n_in, k * n_out * r]
            of_lambda, of_Q, of_P = counts[start : start + sum(sizes)].split(sizes)
            found[places] = of_lambda.view(k, r) + of_Q.view(k, r, -1).mean(2) + of_P.view(k, -1, r).mean(1)
            start += sum(sizes)
        return found.flatten()
