"""LT-SFT: fine-tune fully, see which entries moved most, rewind, and train only those.

K = the k largest |θ₁ − θ₀|,   θ ← θ₀,   then train θ_K:   φ = θ₂ − θ₀ has k entries
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pefttutor import method as base
from pefttutor.kernels.sparse_adamw import read
from pefttutor.parts import entries
from pefttutor.parts.shadow import check_called

__all__ = ["LTSFT", "add_differences", "difference"]

START = "_start"

Difference = Mapping[
    str, tuple[Tensor, Tensor]
]  # flat places (k) and changes (k), by the name of a parameter


@dataclass(frozen=True, kw_only=True)
class LTSFT:
    """Lottery-ticket sparse fine-tuning: two trainings, of which the first only chooses.

        method.attach(model);  pefttutor.fit(model, …)      # phase 1: everything trains
        method.rewind(model);  pefttutor.fit(model, …)      # phase 2: back to θ₀, k entries train

    fraction: share of the entries, over all tensors but `modules_to_save`, that train in phase 2.
    modules_to_save: modules that train fully in both phases, such as a new head; they are rewound too.
    l1_weight: λ of the paper's penalty λ/N · Σ|θ − θ₀| over all N entries, here in phase 1 alone.

    Cost: phase 1 is full fine-tuning and keeps θ₀ in buffers, which aren't saved; phase 2 as `SparseFineTuning`.
    Raises: ValueError for a fraction outside (0, 1] or a negative l1_weight.
    Source: Ansell et al. 2022, arXiv:2110.07560, section 3; chapter 4.3.2, which leaves the rewinding out.
    """

    fraction: float = 0.05
    modules_to_save: Collection[str] = ()
    l1_weight: float = 0.0

    def __post_init__(self) -> None:
        entries.check_fraction(self)
        if not self.l1_weight >= 0:
            raise ValueError(f"l1_weight is {self.l1_weight!r}; it must be a number ≥ 0.")

    def attach(self, model: nn.Module) -> nn.Module:
        """Phase 1: let everything train.

        Raises: RuntimeError if `model` is adapted already; ValueError for a wrong name, or a weight that phase 2
            couldn't train a part of.
        """
        base.refuse_adapted(model)
        check_called(model, entries.candidates(model, self.modules_to_save))
        base.freeze(model)
        for p in model.parameters():
            p.requires_grad_(p.is_floating_point())
        for name, p in list(model.named_parameters()):
            layer, key = _place(model, name)
            layer.register_buffer(key + START, p.detach().clone(), persistent=False)
        return base.mark(model, self)

    def rewind(self, model: nn.Module) -> nn.Module:
        """Phase 2: choose the entries that moved most, put θ₀ back bit for bit, and let only them train.

        Raises: RuntimeError if phase 1 wasn't started with `attach`.
        """
        start = _start(model)
        if not start:
            raise RuntimeError(
                "rewind needs phase 1 before it: method.attach(model), train, method.rewind(model)."
            )
        tensors = entries.candidates(model, self.modules_to_save)
        scores = {name: (p.detach() - start[name]).abs() for name, p in tensors.items()}
        chosen = entries.largest_share(scores, self.fraction)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name])
                layer, key = _place(model, name)
                delattr(layer, key + START)
        base.unmark(model)
        return entries.train_entries(model, self, chosen, self.modules_to_save)

    def penalty(self, model: nn.Module) -> Tensor:
        """λ · mean |θ − θ₀| in phase 1, else 0."""
        start = _start(model) if self.l1_weight else {}
        trained = [(p, start[n]) for n, p in model.named_parameters() if n in start and p.requires_grad]
        if not trained:
            return torch.zeros((), requires_grad=True)
        total = torch.stack([(p - before).abs().sum() for p, before in trained]).sum()
        return self.l1_weight / sum(p.numel() for p, _ in trained) * total

    after_step, restore, loaded = entries.after_step, entries.restore, entries.loaded


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The layer that holds the parameter called `name`, and what it calls it."""
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


def _start(model: nn.Module) -> dict[str, Tensor]:
    """θ₀ by the name of each parameter; empty but for phase 1."""
    buffers = dict(model.named_buffers())
    return {n: buffers[n + START] for n, _ in model.named_parameters() if n + START in buffers}


def difference(model: nn.Module, start: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """φ = θ₂ − θ₀ at the entries that `model` has trained; `start` is the base it was trained from."""
    theta_0, theta_2 = dict(start.named_parameters()), dict(model.named_parameters())
    return {
        name: (index.long(), theta_2[name + entries.VALUES].detach() - read(theta_0[name], index))
        for name, index in entries.entries(model).items()
    }


def add_differences(model: nn.Module, *differences: Difference) -> nn.Module:
    """θ₀ + φ_task + φ_language + …, in place. Raises: ValueError for a difference of another model."""
    parameters = dict(model.named_parameters())
    for phi in differences:
        for name, (places, _) in phi.items():
            if name not in parameters or (len(places) and int(places.max()) >= parameters[name].numel()):
                raise ValueError(
                    f"a difference for {name!r} doesn't fit this model; load the base it was made on."
                )
    with torch.no_grad():
        for phi in differences:
            for name, (places, change) in phi.items():
                parameters[name].view(-1).index_add_(0, places, change.to(parameters[name].dtype))
    return model
