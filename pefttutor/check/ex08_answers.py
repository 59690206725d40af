"""Notebook 08: the right answers, and those that learners write instead, each with its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

# ---- the reference solutions


def bias_names(model: nn.Module) -> list[str]:
    """The names of the parameters whose own name is "bias", in the model's order."""
    return [name for name, _ in model.named_parameters() if name.split(".")[-1] == "bias"]


def smallest_masks(weights: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """Masks of the k = ⌊fraction · n⌋ entries with the smallest |w| over all tensors together."""
    flat = torch.cat([weight.abs().flatten() for weight in weights.values()])
    k = int(fraction * len(flat))
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.argsort(stable=True)[:k]] = True  # of equal ones the first: the same on every machine
    parts = mask.split([weight.numel() for weight in weights.values()])
    return {name: part.view(weights[name].shape) for name, part in zip(weights, parts, strict=True)}


def masked_step(
    weight: Tensor, grad: Tensor, velocity: Tensor, mask: Tensor, lr: float, momentum: float, decay: float
) -> tuple[Tensor, Tensor]:
    """v ← μ v + g + λ w,  w ← w − η v  where the mask is true; elsewhere both stay. Returns w and v."""
    moved = momentum * velocity + grad + decay * weight
    velocity = torch.where(mask, moved, velocity)
    return torch.where(mask, weight - lr * velocity, weight), velocity


# ---- what learners write instead


def _names(keep: Callable[[str], bool]) -> Callable[[nn.Module], list[str]]:
    return lambda model: [name for name, _ in model.named_parameters() if keep(name)]


NAMES_MISTAKES = {
    '"bias" is part of other names too, such as relative_bias.weight: compare the last part': _names(
        lambda name: "bias" in name
    ),
    "a name such as unbias or qkv_bias2 isn't bias: compare the whole last part": _names(
        lambda name: "bias" in name.split(".")[-1]
    ),
    "these are the weights": _names(lambda name: name.split(".")[-1] == "weight"),
    "the norms' shift β is a bias too": _names(lambda name: name.endswith(".bias") and "norm" not in name),
    "one-dimensional isn't the same as bias: norms have a scale": lambda model: [
        name for name, p in model.named_parameters() if p.dim() == 1
    ],
    "only linear layers are looked at; norms and convolutions have biases too": lambda model: [
        f"{name}.bias"
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer.bias is not None
    ],
    "named_modules gives the layers; the parameters' names are asked for": lambda model: [
        name for name, layer in model.named_modules() if getattr(layer, "bias", None) is not None
    ],
    "the names are sorted by the alphabet; keep the model's order": lambda model: sorted(bias_names(model)),
    "these are pairs of name and parameter; return the names": lambda model: [
        (name, p) for name, p in model.named_parameters() if name.split(".")[-1] == "bias"
    ],
}


def _masks(
    *,
    score: Callable[[Tensor], Tensor] = torch.abs,
    largest: bool = False,
    together: bool = True,
    count: Callable[[float, int], int] = lambda fraction, n: int(fraction * n),
    invert: bool = False,
) -> Callable[[Mapping[str, Tensor], float], dict[str, Tensor]]:
    def wrong_masks(weights: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
        groups = [weights] if together else [{name: weight} for name, weight in weights.items()]
        masks: dict[str, Tensor] = {}
        for group in groups:
            flat = torch.cat([score(weight).flatten() for weight in group.values()])
            mask = torch.zeros(len(flat), dtype=torch.bool)
            mask[flat.argsort(descending=largest)[: count(fraction, len(flat))]] = True
            parts = (mask ^ invert).split([weight.numel() for weight in group.values()])
            masks |= {name: part.view(group[name].shape) for name, part in zip(group, parts, strict=True)}
        return masks

    return wrong_masks


def _limited(weights: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    flat = torch.cat([weight.abs().flatten() for weight in weights.values()])
    k = int(fraction * len(flat))
    limit = flat.kthvalue(k).values if k else -1.0
    return {name: weight.abs() <= limit for name, weight in weights.items()}


MASKS_MISTAKES = {
    "these are the largest": _masks(largest=True),
    "without the absolute value the most negative come first": _masks(score=lambda w: w),
    "each tensor has its own limit here; rank all entries together": _masks(together=False),
    "a share of less than one entry is none": _masks(count=lambda f, n: max(1, int(f * n))),
    "k = ⌊fraction · n⌋ rounds down; 9.6 entries are 9, not 10": _masks(count=lambda f, n: -int(-f * n // 1)),
    "the fraction is of entries that train; these are the others": _masks(invert=True),
    "fraction is a share, not percent": _masks(count=lambda f, n: int(f * n / 100)),
    "one entry too many: the k-th itself is included once": _masks(count=lambda f, n: int(f * n) + 1),
    "the distance from the mean is ranked, not |w|": _masks(score=lambda w: (w - w.mean()).abs()),
    "a limit lets in every entry that is equal to it; k are asked for": _limited,
}


def _step(
    *,
    decay_masked: bool = True,
    outside: Callable[[Tensor, Tensor, float], Tensor] = lambda velocity, moved, mu: velocity,
    late: bool = False,
    sign: float = -1.0,
    first_decay: bool = True,
    use_momentum: bool = True,
    old_velocity: bool = False,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """outside: what the velocity is where the mask is false, given the old one, the one that moves, and μ."""

    def wrong_step(
        weight: Tensor, grad: Tensor, velocity: Tensor, mask: Tensor, lr: float, momentum: float, decay: float
    ) -> tuple[Tensor, Tensor]:
        mu = momentum if use_momentum else 0.0
        if late:  # the mask lies on the gradient, then a dense optimizer runs
            moved = mu * velocity + grad * mask + decay * weight
            return weight + sign * lr * moved, moved
        moved = mu * velocity + grad + (decay * weight if first_decay else 0)
        new_velocity = torch.where(mask, moved, outside(velocity, moved, mu))
        used = velocity if old_velocity else new_velocity
        moved_weight = torch.where(mask, weight + sign * lr * used, weight)
        return (moved_weight if decay_masked else moved_weight - lr * decay * weight * ~mask), new_velocity

    return wrong_step


STEP_MISTAKES = {
    "the mask is on the gradient only: momentum and weight decay still move the others": _step(late=True),
    "weight decay still moves the entries outside the mask": _step(decay_masked=False),
    "the velocity changes outside the mask: it would move them once they are chosen": _step(
        outside=lambda velocity, moved, mu: moved
    ),
    "the velocity is set to zero outside the mask; it stays as it was": _step(
        outside=lambda velocity, moved, mu: torch.zeros_like(velocity)
    ),
    "the velocity decays outside the mask; it stays as it was": _step(
        outside=lambda velocity, moved, mu: mu * velocity
    ),
    "the step goes up the gradient": _step(sign=1.0),
    "weight decay is missing": _step(first_decay=False),
    "the old velocity isn't multiplied in: momentum is missing": _step(use_momentum=False),
    "the weight moves by the old velocity": _step(old_velocity=True),
    "the mask is inverted": lambda weight, grad, velocity, mask, lr, momentum, decay: masked_step(
        weight, grad, velocity, ~mask, lr, momentum, decay
    ),
}
