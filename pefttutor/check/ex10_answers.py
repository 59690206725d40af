"""Notebook 10, masks: the right answers, and those that learners write instead, each with its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# ---- the reference solutions


def masked_gradients(
    grads: Mapping[str, Tensor | None], draws: Mapping[str, Tensor], p: float
) -> dict[str, Tensor | None]:
    """F: g / p where the uniform draw is below p, else 0; None stays None."""
    return {name: None if g is None else g * (draws[name] < p) / p for name, g in grads.items()}


def share_outside(p: float, t: int, momentum: bool, decay: bool) -> float:
    """The expected share of the entries outside the mask of step t = 1, 2, … that move in that step."""
    if decay:
        return 1.0
    return 1 - (1 - p) ** (t - 1) if momentum else 0.0


def masked_adamw(
    weight: Tensor,
    grad: Tensor,
    mask: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    t: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of AdamW where the mask is true; elsewhere weight and both moments stay."""
    m = betas[0] * exp_avg + (1 - betas[0]) * grad
    v = betas[1] * exp_avg_sq + (1 - betas[1]) * grad.square()
    step = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    moved = (1 - lr * decay) * weight - lr * step
    return (
        torch.where(mask, moved, weight),
        torch.where(mask, m, exp_avg),
        torch.where(mask, v, exp_avg_sq),
    )


# ---- what learners write instead


def _each(
    of: Callable[[Tensor, Tensor, float], Tensor], none: Callable[[Tensor], Tensor | None] = lambda draw: None
) -> Callable[..., dict[str, Tensor | None]]:
    """A function of gradient, draw and p, on every tensor; `none` of the draw where there is no gradient."""
    return lambda grads, draws, p: {
        name: none(draws[name]) if g is None else of(g, draws[name], p) for name, g in grads.items()
    }


def _in_place(
    grads: Mapping[str, Tensor | None], draws: Mapping[str, Tensor], p: float
) -> dict[str, Tensor | None]:
    for name, g in grads.items():
        if g is not None:
            g.mul_(draws[name] < p).div_(p)
    return dict(grads)


def _without_none(
    grads: Mapping[str, Tensor | None], draws: Mapping[str, Tensor], p: float
) -> dict[str, Any]:
    return {name: g for name, g in masked_gradients(grads, draws, p).items() if g is not None}


IN_PLACE = "the given gradients are changed in place; return new ones"

GRADIENTS_MISTAKES = {
    "1/p is missing: the mean of many draws is p · g, not g": _each(lambda g, u, p: g * (u < p)),
    "multiplied with p in place of divided": _each(lambda g, u, p: g * (u < p) * p),
    "the mask is inverted: keep where the draw is below p": _each(lambda g, u, p: g * (u >= p) / p),
    "this keeps a share 1 − p: p is the share that is kept": _each(lambda g, u, p: g * (u < 1 - p) / p),
    "divided by 1 − p, the share that is dropped": _each(lambda g, u, p: g * (u < p) / (1 - p)),
    "this is 0-1 mask / p without the gradient": _each(lambda g, u, p: (u < p) / p),
    "every gradient is divided by p, also without a mask": _each(lambda g, u, p: g / p),
    "divided by √p: that keeps the norm, not the mean": _each(lambda g, u, p: g * (u < p) / p**0.5),
    "the draw itself is multiplied in: a mask is 0 or 1": _each(lambda g, u, p: g * u / p),
    "one draw decides for the whole tensor: each entry has its own": _each(
        lambda g, u, p: g * (u.flatten()[0] < p) / p
    ),
    "the kept entries are those with the largest gradient: F doesn't look at it": _each(
        lambda g, u, p: g * (g.abs() >= g.abs().quantile(1 - p)) / p
    ),
    "divided by the share that this draw happened to keep; p is a constant": _each(
        lambda g, u, p: g * (u < p) / (u < p).float().mean()
    ),
    "a tensor without a gradient gets zeros: an optimizer would then decay it; leave None": _each(
        lambda g, u, p: g * (u < p) / p, none=torch.zeros_like
    ),
    "a tensor without a gradient is missing in the result: keep its None": _without_none,
    IN_PLACE: _in_place,
}

_share = share_outside

SHARE_MISTAKES: dict[str, Callable[..., Any]] = {
    "momentum knows the earlier steps only, t − 1 of them; this counts the step itself": (
        lambda p, t, momentum, decay: 1.0 if decay else (1 - (1 - p) ** t) * momentum
    ),
    "weight decay moves all entries, with or without momentum": lambda p, t, momentum, decay: (
        1.0 if decay and momentum else _share(p, t, momentum, False)
    ),
    "weight decay is forgotten: it moves every entry in every step": lambda p, t, momentum, decay: _share(
        p, t, momentum, False
    ),
    "momentum is forgotten: a chosen entry goes on moving": lambda p, t, momentum, decay: _share(
        p, t, False, decay
    ),
    "this is the share that has *not* been chosen before": lambda p, t, momentum, decay: (
        1.0 if decay else (1 - p) ** (t - 1) * momentum
    ),
    "p isn't the share that is masked: an entry is missed with probability 1 − p": (
        lambda p, t, momentum, decay: 1.0 if decay else (1 - p ** (t - 1)) * momentum
    ),
    "shares of several steps don't add up: an entry may be chosen twice": (
        lambda p, t, momentum, decay: 1.0 if decay else min(1.0, p * (t - 1)) * momentum
    ),
    "only the step before is looked at; momentum remembers all of them": (
        lambda p, t, momentum, decay: 1.0 if decay else (p if t > 1 else 0.0) * momentum
    ),
    "without momentum and weight decay nothing outside moves; the earlier masks don't matter then": (
        lambda p, t, momentum, decay: 1.0 if decay else 1 - (1 - p) ** (t - 1)
    ),
    "this is the share of *all* entries; asked is the share of those outside the mask": (
        lambda p, t, momentum, decay: (1 - p) * _share(p, t, momentum, decay)
    ),
    "percent in place of a share": lambda p, t, momentum, decay: 100 * _share(p, t, momentum, decay),
}


def _step(
    *,
    mask_gradient_only: bool = False,
    moments_stay: bool = True,
    decay_outside: bool = False,
    correct: bool = True,
    coupled: bool = False,
    decays: bool = True,
    square: bool = True,
    eps_inside: bool = False,
    swap_betas: bool = False,
    sign: float = -1.0,
    root: bool = True,
    full_decay: bool = False,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def wrong_step(
        weight: Tensor,
        grad: Tensor,
        mask: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        t: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        decay: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        b1, b2 = betas[::-1] if swap_betas else betas
        g = grad * mask if mask_gradient_only else grad
        g = g + decay * weight if coupled else g
        m = b1 * exp_avg + (1 - b1) * g
        v = b2 * exp_avg_sq + (1 - b2) * (g.square() if square else g.abs())
        m_hat, v_hat = (m / (1 - b1**t), v / (1 - b2**t)) if correct else (m, v)
        scale = (v_hat + eps).sqrt() if eps_inside else (v_hat.sqrt() if root else v_hat) + eps
        shrink = 1 - (decay if full_decay else lr * decay) if decays and not coupled else 1.0
        moved = shrink * weight + sign * lr * m_hat / scale
        if mask_gradient_only:
            return moved, m, v
        stays = weight * shrink if decay_outside else weight
        if not moments_stay:
            return torch.where(mask, moved, stays), m, v
        return (
            torch.where(mask, moved, stays),
            torch.where(mask, m, exp_avg),
            torch.where(mask, v, exp_avg_sq),
        )

    return wrong_step


def _weight_alone(weight: Tensor, grad: Tensor, mask: Tensor, *rest: Any, **settings: Any) -> Tensor:
    return masked_adamw(weight, grad, mask, *rest, **settings)[0]


def _inverted(weight: Tensor, grad: Tensor, mask: Tensor, *rest: Any, **settings: Any) -> Any:
    return masked_adamw(weight, grad, ~mask, *rest, **settings)


ADAMW_MISTAKES: dict[str, Callable[..., Any]] = {
    "the mask lies on the gradient only: momentum and weight decay still move the others": _step(
        mask_gradient_only=True
    ),
    "the moments change outside the mask: they must stay there": _step(moments_stay=False),
    "weight decay still moves the entries outside the mask": _step(decay_outside=True),
    "the bias correction is missing: divide m by 1 − β₁ᵗ and v by 1 − β₂ᵗ": _step(correct=False),
    "weight decay goes through the gradient: that is Adam with L2, not AdamW": _step(coupled=True),
    "weight decay is missing": _step(decays=False),
    "v averages g², not |g|": _step(square=False),
    "ε belongs outside the root": _step(eps_inside=True),
    "β₁ and β₂ are swapped": _step(swap_betas=True),
    "the step goes up the gradient": _step(sign=1.0),
    "divided by v in place of √v": _step(root=False),
    "weight decay isn't multiplied with the learning rate": _step(full_decay=True),
    "the mask is inverted": _inverted,
    "both moments must be returned, too": _weight_alone,
}
