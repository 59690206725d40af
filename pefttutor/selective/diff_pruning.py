"""Diff-pruning: learn a difference to the weights, and gates that make most of it zero.

θ = θ₀ + z ⊙ w,    z = clamp(σ(log u − log(1 − u) + α) · (r − l) + l, 0, 1),    u ~ U(0, 1)

E‖z‖₀ = Σ σ(α − log(−l / r)) is differentiable, and is added to the loss.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.method import DEFAULT, Attachment, attached, attaching
from pefttutor.parts.attachment import added_key
from pefttutor.parts.called import check_called
from pefttutor.parts.choosing_again import settle_as
from pefttutor.parts.entries import candidates
from pefttutor.parts.freezing import train_fully
from pefttutor.parts.ranking import largest_share
from pefttutor.parts.settings import check_names, check_number
from pefttutor.parts.shadow import Shadowed

__all__ = ["DiffPruning", "gate", "open_probability"]

DELTA, ALPHA, GROUP = "_delta", "_alpha", "_group"
LEFT, RIGHT = -1.5, 1.5


def gate(alpha: Tensor, u: Tensor | None = None) -> Tensor:
    """The hard-concrete gate z: random with u ~ U(0, 1), its usual value with u = None.

    >>> gate(torch.tensor([-2.0, 1.0, 2.0]))                            # closed, half open, open
    tensor([0.0000, 0.6932, 1.0000])

    Shapes: (…), (…) → (…). Source: Louizos et al. 2018, arXiv:1712.01312.
    """
    noise = 0 if u is None else u.log() - (-u).log1p()
    return ((noise + alpha).sigmoid() * (RIGHT - LEFT) + LEFT).clamp(0, 1)


def open_probability(alpha: Tensor) -> Tensor:
    """The probability that a gate is open, P(z ≠ 0) = σ(α − log(−l / r)).

    >>> open_probability(torch.zeros(2))                                # l = −r here, so α = 0 is as good as a coin
    tensor([0.5000, 0.5000])

    Shapes: (…) → (…). Source: Louizos et al. 2018, arXiv:1712.01312, eq. 12.
    """
    return (alpha - math.log(-LEFT / RIGHT)).sigmoid()


@dataclass(frozen=True, kw_only=True)
class DiffPruning:
    """Train a difference w and its gates α together; then keep the largest entries and train on with these alone.

        method.attach(model);                 pefttutor.fit(model, …)      # w and the gates
        method.project(model, fraction=0.005); pefttutor.fit(model, …)     # the largest |z ⊙ w| alone

    >>> model = DiffPruning(structured=False).attach(nn.Linear(3, 2))
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['weight_delta', 'weight_alpha', 'bias_delta', 'bias_alpha']

    l0_weight: λ of the penalty λ · E‖z‖₀.
    alpha_init: where α starts; 5 opens nearly all gates. alpha_lr: the learning rate of α, larger than that of w.
    structured: whether each tensor also has a gate as a whole, which is multiplied with those of its entries.
    modules_to_save: modules that train fully, without gates, such as a new head ("classifier").

    In training each call of a layer draws gates anew, so a tied weight has other gates at each of its uses.

    Shapes: w and α have the shape of their weight; a tensor's own gate is one value.
    Cost: three values are held for each weight (θ₀, w, α), and twice AdamW's state of full fine-tuning.
    Raises: ValueError for settings that make no sense.
    Source: Guo et al. 2021, arXiv:2012.07463, eq. 2 to 6; chapter 4.3.2 cites it as learned selection.
    """

    l0_weight: float = 1.25e-7
    alpha_init: float = 5.0
    alpha_lr: float = 0.1
    structured: bool = True
    modules_to_save: Collection[str] = ()

    def __post_init__(self) -> None:
        check_number(self, "l0_weight", least=0)
        check_number(self, "alpha_init")
        check_number(self, "alpha_lr", above=0)
        check_names(self, "modules_to_save")

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, give every weight a difference and gates, and return it.

        Raises: ValueError if the name is in use, or for a weight that is read without its layer.
        """
        with attaching(model, self, name) as new:
            tensors = candidates(model, self.modules_to_save)
            check_called(model, tensors)
            for weight_name, weight in tensors.items():
                key = weight_name.rpartition(".")[2]
                delta, alpha, group = (added_key(key + ending, name) for ending in (DELTA, ALPHA, GROUP))
                # At least float32: in half precision a gate of 5 would be too large to move by a step.
                zeros = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
                added = {delta: zeros, alpha: torch.full_like(zeros, self.alpha_init)}
                if self.structured:
                    added[group] = torch.full_like(zeros.sum(), self.alpha_init)
                parameters = {key: nn.Parameter(tensor.detach()) for key, tensor in added.items()}
                shifted = Shifted(delta, alpha, group, self.structured)
                new.add(Shadowed(model, weight_name, name, shifted, parameters))
            for part in train_fully(model, (), self.modules_to_save):
                new.add(part)
        return model

    def penalty(self, model: nn.Module) -> Tensor:
        """What is added to the loss, λ · E‖z‖₀; it is 0 after `project`."""
        parts = [part.make.open(part.owners[0][0]).sum() for a in self._mine(model) for part in _gated(a)]
        return self.l0_weight * sum(parts, torch.zeros((), requires_grad=True))

    def optimizer(self, model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """AdamW with a learning rate of its own for the gates, which don't decay."""
        gates = [
            part.owners[0][0].get_parameter(key)
            for attachment in self._mine(model)
            for part in _gated(attachment)
            for key in part.added_keys[1:]
        ]
        gate_ids = {id(gate) for gate in gates}
        differences = [p for p in model.parameters() if p.requires_grad and id(p) not in gate_ids]
        optimizer = torch.optim.AdamW(differences, lr=lr, weight_decay=weight_decay)
        if gates:
            optimizer.add_param_group({"params": gates, "lr": self.alpha_lr, "weight_decay": 0.0})
        return optimizer

    def project(self, model: nn.Module, *, fraction: float = 0.005, name: str | None = None) -> nn.Module:
        """Keep the largest |z ⊙ w|, drop the gates, and let the kept entries alone train on.

        z is each gate's usual value, in whatever mode the model is. `name` says which DiffPruning is meant, where there
        are several.

        Raises: ValueError for a fraction outside (0, 1]; RuntimeError if no gates are attached.
        """
        if not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
            raise ValueError(f"fraction is {fraction!r}; it must be in (0, 1].")
        mine = [a for a in self._mine(model) if _gated(a) and name in (None, a.name)]
        if len(mine) != 1:
            raise RuntimeError(
                f"project needs DiffPruning attached, with its gates; this model has {len(mine)} such attachments."
            )
        gated = _gated(mine[0])
        changes = {part.weight_name: part.make.change(part.owners[0][0]).detach() for part in gated}
        chosen = largest_share({weight_name: c.abs() for weight_name, c in changes.items()}, fraction)
        settle_as(model, mine[0], gated, chosen, changes)
        return model

    def _mine(self, model: nn.Module) -> list[Attachment]:
        return [a for a in attached(model).values() if a.method == self]


def _gated(attachment: Attachment) -> list[Any]:
    """The parts of an attachment that have gates; after `project` there are none."""
    return [p for p in attachment.parts if isinstance(p, Shadowed) and isinstance(p.make, Shifted)]


@dataclass(frozen=True)
class Shifted:
    """In a weight's place: the weight and its gated difference. The fields are the keys of w, α and the group's α."""

    delta: str
    alpha: str
    group: str
    structured: bool

    def __call__(self, layer: nn.Module, key: str, weight: Tensor) -> Tensor:
        return weight + self.change(layer, random=layer.training).to(weight.dtype)

    def change(self, layer: nn.Module, *, random: bool = False) -> Tensor:
        """The gated difference z ⊙ w, with random gates or with their usual values."""

        def opened(alpha: Tensor) -> Tensor:
            u = torch.rand_like(alpha).clamp(1e-4, 1 - 1e-4) if random else None
            return gate(alpha, u)

        z = opened(layer.get_parameter(self.alpha))
        if self.structured:
            z = z * opened(layer.get_parameter(self.group))
        return z * layer.get_parameter(self.delta)

    def open(self, layer: nn.Module) -> Tensor:
        """The probability of each entry to have an open gate."""
        probability = open_probability(layer.get_parameter(self.alpha))
        if self.structured:
            probability = probability * open_probability(layer.get_parameter(self.group))
        return probability
