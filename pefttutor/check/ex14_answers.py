"""Notebook 14: the right answers, and those that learners write instead, each with its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# ---- the reference solutions


def orthogonality(rows: Tensor) -> Tensor:
    """R(M) = ‖M Mᵀ − I‖²_F          M (r, n), which is Q or Pᵀ → one number."""
    return (rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)).square().sum()


def importance(
    weight: Tensor, grad: Tensor, mean: Tensor, spread: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The new Ī, the new Ū and the score Ī · Ū, from I = |w ∂L/∂w|          all of one shape."""
    now = (weight * grad).abs()
    mean = beta1 * mean + (1 - beta1) * now
    spread = beta2 * spread + (1 - beta2) * (now - mean).abs()
    return mean, spread, mean * spread


def budget(step: int, first: int, last: int, tinit: int, tfinal: int, total: int) -> int:
    """`first` until tinit, `last` in the last tfinal steps, between them last + (first − last) (1 − progress)³."""
    progress = (step - tinit) / (total - tfinal - tinit)
    return int(last + (first - last) * (1 - min(max(progress, 0), 1)) ** 3)


def proximal(gate: Tensor, by: float) -> Tensor:
    """sign(g) · max(|g| − by, 0), of every gate."""
    return gate.sign() * (gate.abs() - by).clamp(min=0)


# ---- what learners write instead


def _away(rows: Tensor) -> Tensor:
    return rows @ rows.T - torch.eye(len(rows))


ORTHOGONALITY_MISTAKES: dict[str, Callable[..., Any]] = {
    "this is the norm, not its square: the paper's R has the square": lambda rows: _away(rows).norm(),
    "MᵀM is compared with I: it is n × n, and of rank r at most": lambda rows: _away(rows.T).square().sum(),
    "I is missing: this pulls M to zero": lambda rows: (rows @ rows.T).square().sum(),
    "1 is subtracted everywhere; I has ones on its diagonal only": lambda rows: (
        (rows @ rows.T - 1).square().sum()
    ),
    "this is a mean over entries; the Frobenius norm is a sum": lambda rows: _away(rows).square().mean(),
    "these are absolute values; the Frobenius norm sums squares": lambda rows: _away(rows).abs().sum(),
    "only the diagonal counts: lengths are held, angles aren't": lambda rows: (
        _away(rows).diag().square().sum()
    ),
    "the diagonal doesn't count: angles are held, lengths aren't": lambda rows: (
        (_away(rows) - _away(rows).diag().diag()).square().sum()
    ),
    "M is compared with I, not M Mᵀ": lambda rows: (rows - torch.eye(*rows.shape)).square().sum(),
    "the differences are summed before they are squared": lambda rows: _away(rows).sum().square(),
    "this is the trace: differences cancel, and angles don't count": lambda rows: _away(rows).trace(),
    "this is half of it": lambda rows: orthogonality(rows) / 2,
    "the result is cut off from the graph (.data, .detach() or .item())": lambda rows: orthogonality(
        rows.detach()
    ),
}


def _averaged(
    *,
    now: Callable[[Tensor, Tensor], Tensor] = lambda w, g: (w * g).abs(),
    kept: Callable[[float], float] = lambda beta: beta,
    second: Callable[[float, float], float] = lambda beta1, beta2: beta2,
    away: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda now, old, new: (now - new).abs(),
    score: Callable[[Tensor, Tensor], Tensor] = lambda mean, spread: mean * spread,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def wrong_importance(
        weight: Tensor, grad: Tensor, mean: Tensor, spread: Tensor, beta1: float, beta2: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        this, of_mean, of_spread = now(weight, grad), kept(beta1), kept(second(beta1, beta2))
        new = of_mean * mean + (1 - of_mean) * this
        spread = of_spread * spread + (1 - of_spread) * away(this, mean, new)
        return new, spread, score(new, spread)

    return wrong_importance


def _in_place(
    weight: Tensor, grad: Tensor, mean: Tensor, spread: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor, Tensor]:
    now = (weight * grad).abs()
    mean.mul_(beta1).add_((1 - beta1) * now)
    spread.mul_(beta2).add_((1 - beta2) * (now - mean).abs())
    return mean, spread, mean * spread


IMPORTANCE_MISTAKES: dict[str, Callable[..., Any]] = {
    "I keeps the sign of w ∂L/∂w: take the absolute value": _averaged(now=lambda w, g: w * g),
    "I is |∂L/∂w|: the weight is missing": _averaged(now=lambda w, g: g.abs()),
    "I is |w|: the gradient is missing": _averaged(now=lambda w, g: w.abs()),
    "I is squared": _averaged(now=lambda w, g: (w * g).square()),
    "the shares are swapped: β is the share of the old average, 1 − β that of the new value": _averaged(
        kept=lambda beta: 1 - beta
    ),
    "Ū is averaged with β₁; it has a β₂ of its own": _averaged(second=lambda beta1, beta2: beta1),
    "Ū compares I with the old Ī; take the new one": _averaged(away=lambda now, old, new: (now - old).abs()),
    "Ū averages I − Ī with its sign, which cancels": _averaged(away=lambda now, old, new: now - new),
    "Ū averages squares; it is |I − Ī|": _averaged(away=lambda now, old, new: (now - new).square()),
    "the score is a sum; it is the product of Ī and Ū": _averaged(score=lambda mean, spread: mean + spread),
    "the score is Ī / Ū; it is the product, so that what is uncertain is kept": _averaged(
        score=lambda mean, spread: mean / spread
    ),
    "the score is Ī alone": _averaged(score=lambda mean, spread: mean),
    "the averages are changed in place (mul_, lerp_, +=): return new tensors": _in_place,
}


def _course(
    *,
    left: Callable[[float], float] = lambda progress: (1 - progress) ** 3,
    low: float = 0.0,
    high: float = 1.0,
    whole: Callable[[float], Any] = int,
    start: bool = True,
    end: bool = True,
) -> Callable[..., Any]:
    def wrong_budget(step: int, first: int, last: int, tinit: int, tfinal: int, total: int) -> Any:
        tinit, tfinal = tinit if start else 0, tfinal if end else 0
        progress = min(max((step - tinit) / (total - tfinal - tinit), low), high)
        return whole(last + (first - last) * left(progress))

    return wrong_budget


BUDGET_MISTAKES: dict[str, Callable[..., Any]] = {
    "the budget falls in a line; the remaining part goes with the third power": _course(
        left=lambda progress: 1 - progress
    ),
    "the remaining part goes with the square; the paper has the third power": _course(
        left=lambda progress: (1 - progress) ** 2
    ),
    "this is 1 − progress³, slow at first; (1 − progress)³ is fast at first": _course(
        left=lambda progress: 1 - progress**3
    ),
    "before tinit the progress is negative, and the budget larger than at first: hold it at 0": _course(
        low=-10.0
    ),
    "after the end the progress is above 1, and the budget falls below its target: hold it at 1": _course(
        high=10.0
    ),
    "tinit is left out: the budget falls from step 0 on": _course(start=False),
    "tfinal is left out: the budget falls until the last step": _course(end=False),
    "the budget is rounded; cut it down to a whole number with int": _course(whole=round),
    "the budget isn't a whole number of triplets": _course(whole=float),
    "first and last are swapped: the budget grows": lambda step, first, last, tinit, tfinal, total: budget(
        step, last, first, tinit, tfinal, total
    ),
    "last is missing: the budget falls to 0": lambda step, first, last, tinit, tfinal, total: int(
        (first - last) * (1 - min(max((step - tinit) / (total - tfinal - tinit), 0), 1)) ** 3
    ),
    "all of `first` falls away on top of `last`: only first − last does": (
        lambda step, first, last, tinit, tfinal, total: int(
            last + first * (1 - min(max((step - tinit) / (total - tfinal - tinit), 0), 1)) ** 3
        )
    ),
}


def _two_steps(gate: Tensor, by: float) -> Tensor:
    smaller = torch.where(gate > 0, gate - by, gate + by)
    return torch.where(smaller.abs() < by, torch.zeros_like(gate), smaller)


PROXIMAL_MISTAKES: dict[str, Callable[..., Any]] = {
    "the gate is pulled by λ and then zeroed below λ, so that all below 2 λ is lost: the released code": (
        _two_steps
    ),
    "what stays isn't pulled: this is the hard threshold": lambda gate, by: torch.where(
        gate.abs() > by, gate, torch.zeros_like(gate)
    ),
    "the sign is lost": lambda gate, by: (gate.abs() - by).clamp(min=0),
    "a gate smaller than λ goes past zero instead of stopping there": lambda gate, by: (
        gate - by * gate.sign()
    ),
    "negative gates are closed, too": lambda gate, by: (gate - by).clamp(min=0),
    "negative gates are pulled away from zero": lambda gate, by: torch.where(
        gate.abs() > by, gate - by, torch.zeros_like(gate)
    ),
    "gates are shrunk by a factor, as weight decay does; none becomes zero": lambda gate, by: gate * (1 - by),
    "this is the step of a squared penalty, which makes no zeros": lambda gate, by: gate / (1 + by),
    "gates are cut to at most λ; what is left over is the result": lambda gate, by: gate.clamp(-by, by),
    "the gate is pulled by λ²": lambda gate, by: proximal(gate, by * by),
    "the gates are changed in place; return new ones": lambda gate, by: gate.copy_(proximal(gate, by)),
}
