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

from pefttutor import method as base
from pefttutor.parts import entries
from pefttutor.parts.fingerprint import describe_base
from pefttutor.parts.shadow import check_called, owners, shadow, unshadow

__all__ = ["DiffPruning", "gate", "open_probability"]

DELTA, ALPHA, GROUP = "_delta", "_alpha", "_group"
LEFT, RIGHT = -1.5, 1.5


def gate(alpha: Tensor, u: Tensor | None = None) -> Tensor:
    """The hard-concrete z: random with u ~ U(0, 1), its usual value with u = None. Shapes: (…), (…) → (…)."""
    noise = 0 if u is None else u.log() - (-u).log1p()
    return ((noise + alpha).sigmoid() * (RIGHT - LEFT) + LEFT).clamp(0, 1)


def open_probability(alpha: Tensor) -> Tensor:
    """P(z ≠ 0) = σ(α − log(−l / r)). Source: Louizos et al. 2018, arXiv:1712.01312, eq. 12."""
    return (alpha - math.log(-LEFT / RIGHT)).sigmoid()


@dataclass(frozen=True, kw_only=True)
class DiffPruning:
    """Train a difference w and its gates α together; then keep the largest entries and train on with these alone.

        method.attach(model);                 pefttutor.fit(model, …)      # w and the gates
        method.project(model, fraction=0.005); pefttutor.fit(model, …)     # the largest |z ⊙ w| alone

    l0_weight: λ of the penalty λ · E‖z‖₀.
    alpha_init: start of α; 5 opens nearly all gates. alpha_lr: its learning rate, larger than that of w.
    structured: another gate for each tensor as a whole, multiplied with those of its entries.
    modules_to_save: modules that train fully, without gates, such as a new head ("classifier").

    In training each call of a layer draws gates anew: a tied weight has other ones at each of its uses.

    Cost: three values a weight (θ₀, w, α), twice AdamW's state of full fine-tuning.
    Raises: ValueError for settings that make no sense.
    Source: Guo et al. 2021, arXiv:2012.07463, eq. 2 to 6; chapter 4.3.2 cites it as learned selection.
    """

    l0_weight: float = 1.25e-7
    alpha_init: float = 5.0
    alpha_lr: float = 0.1
    structured: bool = True
    modules_to_save: Collection[str] = ()

    def __post_init__(self) -> None:
        if not self.l0_weight >= 0 or not self.alpha_lr > 0:
            raise ValueError(
                f"l0_weight is {self.l0_weight!r} and alpha_lr {self.alpha_lr!r}; expected ≥ 0 and > 0."
            )

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze `model`, give every weight a difference and gates, and return it."""
        base.refuse_adapted(model)
        tensors = entries.candidates(model, self.modules_to_save)
        whole = set(entries.candidates(model)) - set(tensors)
        check_called(model, tensors)
        base.freeze(model)
        for name, p in model.named_parameters():
            p.requires_grad_(name in whole)
        for weight in tensors.values():
            parts = {DELTA: torch.zeros_like(weight), ALPHA: torch.full_like(weight, self.alpha_init)}
            if self.structured:
                parts[GROUP] = torch.full((), self.alpha_init, dtype=weight.dtype, device=weight.device)
            new = {key: nn.Parameter(part.detach()) for key, part in parts.items()}
            for layer, key in owners(model, weight):
                for ending, parameter in new.items():
                    layer.register_parameter(key + ending, parameter)
                shadow(layer, key, _shifted)
        return base.mark(model, self)

    def penalty(self, model: nn.Module) -> Tensor:
        """λ · E‖z‖₀; 0 after `project`."""
        parts = [_open(layer, key).sum() for layer, key in _gated(model).values()]
        return self.l0_weight * sum(parts, torch.zeros((), requires_grad=True))

    def optimizer(self, model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """AdamW with a learning rate for the gates; they don't decay."""
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gates = [p for name, p in trained.items() if name.endswith((ALPHA, GROUP))]
        others = [p for name, p in trained.items() if not name.endswith((ALPHA, GROUP))]
        optimizer = torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay)
        if gates:
            optimizer.add_param_group({"params": gates, "lr": self.alpha_lr, "weight_decay": 0.0})
        return optimizer

    def project(self, model: nn.Module, *, fraction: float = 0.005) -> nn.Module:
        """Keep the largest |z ⊙ w|, drop the gates, and let the kept entries alone train on.

        z is each gate's usual value, in whatever mode the model is.

        Raises: ValueError for a fraction outside (0, 1]; RuntimeError if no gates are attached.
        """
        if not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
            raise ValueError(f"fraction is {fraction!r}; it must be in (0, 1].")
        gated = _gated(model)
        if not gated:
            raise RuntimeError("project needs DiffPruning attached, with its gates, and this model has none.")
        changes = {name: _change(layer, key).detach() for name, (layer, key) in gated.items()}
        chosen = entries.largest_share({name: c.abs() for name, c in changes.items()}, fraction)
        for weight in [layer._parameters[key] for layer, key in gated.values()]:
            for layer, key in owners(model, weight):  # type: ignore[arg-type]
                unshadow(layer, key)
                for ending in (DELTA, ALPHA, GROUP):
                    layer._parameters.pop(key + ending, None)
        base.unmark(model)
        parameters = dict(model.named_parameters())
        described = describe_base(model, without=[n for n, p in parameters.items() if n not in changes])
        with torch.no_grad():
            for name, change in changes.items():
                parameters[name].add_(change * chosen[name])
        return entries.train_entries(model, self, chosen, self.modules_to_save, described=described)

    after_step, restore, loaded = entries.after_step, entries.restore, entries.loaded


def _gated(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Every tensor with gates, once, by its name."""
    found: dict[str, tuple[nn.Module, str]] = {}
    names = dict(model.named_parameters())
    for prefix, layer in model.named_modules():
        for key, make in vars(layer).get("_shadows", {}).items():
            if make is _shifted and f"{prefix}.{key}".lstrip(".") in names:
                found[f"{prefix}.{key}".lstrip(".")] = (layer, key)
    return found


def _open(layer: nn.Module, key: str) -> Tensor:
    probability = open_probability(layer.get_parameter(key + ALPHA))
    group = layer._parameters.get(key + GROUP)
    return probability if group is None else probability * open_probability(group)


def _change(layer: nn.Module, key: str, *, random: bool = False) -> Tensor:
    """z ⊙ w: with random gates, or with their usual values."""

    def opened(alpha: Any) -> Tensor:
        u = torch.rand_like(alpha).clamp(1e-4, 1 - 1e-4) if random else None
        return gate(alpha, u)

    z = opened(layer.get_parameter(key + ALPHA))
    group = layer._parameters.get(key + GROUP)
    return (z if group is None else z * opened(group)) * layer.get_parameter(key + DELTA)


def _shifted(layer: nn.Module, key: str) -> Tensor:
    weight = layer._parameters[key]
    assert weight is not None
    return weight + _change(layer, key, random=layer.training)
