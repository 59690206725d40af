"""Notebook 11: the right answers, and those that learners write instead, each with its name."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# ---- the reference solutions


def masked_linear(x: Tensor, weight: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """y = x (W₀ ⊙ 1[S > τ])ᵀ, with the gradient of the mask handed to the scores as it is.   (…, in) → (…, out)."""
    mask = (scores > threshold).to(weight) + (scores - scores.detach())
    return x @ (weight * mask).T


def hard_concrete(alpha: Tensor, u: Tensor, left: float, right: float) -> tuple[Tensor, Tensor]:
    """The gate z and P(z ≠ 0); both like alpha."""
    s = (u.log() - (1 - u).log() + alpha).sigmoid()
    return (s * (right - left) + left).clamp(0, 1), (alpha - math.log(-left / right)).sigmoid()


def second_order_mask(gradients: Tensor, curvature: Tensor, k: int) -> Tensor:
    """True for the k entries with the largest (Σ_s g_s)² / h.   (S, n), (n) → (n) booleans."""
    mask = torch.zeros(len(curvature), dtype=torch.bool)
    mask[(gradients.sum(0).square() / curvature).argsort(descending=True)[:k]] = True
    return mask


def best_fall(g: Tensor, H: Tensor, chosen: Tensor) -> Tensor:
    """½ g_Sᵀ H_SS⁻¹ g_S: how far the quadratic falls if the chosen entries S go to their joint optimum."""
    return 0.5 * g[chosen] @ torch.linalg.solve(H[chosen][:, chosen], g[chosen])


# ---- what learners write instead


def _masked(
    *,
    hard: Callable[[Tensor, float], Tensor] = lambda s, t: (s > t).float(),
    soft: Callable[[Tensor, float], Tensor] = lambda s, t: s,
) -> Callable[..., Tensor]:
    """The mask is hard(S) forwards, and has the gradient of soft(S)."""

    def wrong_linear(x: Tensor, weight: Tensor, scores: Tensor, threshold: float) -> Tensor:
        path = soft(scores, threshold)
        return x @ (weight * (hard(scores, threshold) + (path - path.detach()))).T

    return wrong_linear


def _without_weight(x: Tensor, weight: Tensor, scores: Tensor, threshold: float) -> Tensor:
    hard = weight * (scores > threshold)
    return x @ (hard + (scores - scores.detach())).T


def _in_place(x: Tensor, weight: Tensor, scores: Tensor, threshold: float) -> Tensor:
    weight *= (scores > threshold).to(weight)
    return x @ (weight + weight * (scores - scores.detach())).T


def _on_outputs(x: Tensor, weight: Tensor, scores: Tensor, threshold: float) -> Tensor:
    keep = (scores > threshold).to(weight) + (scores - scores.detach())
    return x @ weight.T * keep.mean(1)


LINEAR_MISTAKES = {
    "the step has no gradient, so the scores never learn: pass it straight through": (
        lambda x, weight, scores, threshold: x @ (weight * (scores > threshold)).T
    ),
    "a score at the threshold itself is off: >, not ≥": _masked(hard=lambda s, t: (s >= t).float()),
    "the mask is inverted: scores above the threshold keep their weight": _masked(
        hard=lambda s, t: (s <= t).float()
    ),
    "the size of the scores is compared; a negative score is off": _masked(
        hard=lambda s, t: (s.abs() > t).float()
    ),
    "this mask is soft, between 0 and 1; a step is wanted": lambda x, weight, scores, threshold: (
        x @ (weight * (scores - threshold).sigmoid()).T
    ),
    "the gradient goes through a sigmoid; straight through means as it is": _masked(
        soft=lambda s, t: (s - t).sigmoid()
    ),
    "the gradient is cut off where a score is off; those could never come back": _masked(
        soft=lambda s, t: (s - t).relu()
    ),
    "the scores' gradient lacks the factor W₀: the mask multiplies the weight": _without_weight,
    "the score scales the weight: 1[S > τ] · S instead of 1[S > τ]": lambda x, weight, scores, threshold: (
        x @ (weight * scores * (scores > threshold)).T
    ),
    "the threshold is 0 here, not τ": _masked(hard=lambda s, t: (s > 0).float()),
    "the mask is added to the weight; it multiplies": lambda x, weight, scores, threshold: (
        x @ (weight + (scores > threshold).to(weight) + (scores - scores.detach())).T
    ),
    "the frozen weight is changed in place": _in_place,
    "whole outputs are scaled; the mask is for single weights": _on_outputs,
}


def _gate(
    *,
    noise: Callable[[Tensor], Tensor] = lambda u: u.log() - (1 - u).log(),
    squash: Callable[[Tensor], Tensor] = torch.sigmoid,
    stretch: Callable[[Tensor, float, float], Tensor] = lambda s, left, right: s * (right - left) + left,
    clamp: Callable[[Tensor], Tensor] = lambda z: z.clamp(0, 1),
    chance: Callable[[Tensor, float, float], Tensor] = lambda a, left, right: (
        a - math.log(-left / right)
    ).sigmoid(),
) -> Callable[..., tuple[Tensor, Tensor]]:
    def wrong_gate(alpha: Tensor, u: Tensor, left: float, right: float) -> tuple[Tensor, Tensor]:
        z = clamp(stretch(squash(noise(u) + alpha), left, right))
        return z, chance(alpha, left, right)

    return wrong_gate


def _counted(alpha: Tensor, u: Tensor, left: float, right: float) -> tuple[Tensor, Tensor]:
    z = hard_concrete(alpha, u, left, right)[0]
    return z, (z != 0).float()


def _mean(alpha: Tensor, u: Tensor, left: float, right: float) -> tuple[Tensor, Tensor]:
    z = hard_concrete(alpha, u, left, right)[0]
    return z, z


def _summed(alpha: Tensor, u: Tensor, left: float, right: float) -> tuple[Tensor, Tensor]:
    z, chance = hard_concrete(alpha, u, left, right)
    return z, chance.sum()


GATE_MISTAKES = {
    "the clamp to [0, 1] is missing: no gate is ever exactly 0": _gate(clamp=lambda z: z),
    "only the lower end is clamped: gates above 1 are left": _gate(clamp=lambda z: z.clamp(min=0)),
    "the stretch to (l, r) is missing: a sigmoid never reaches 0": _gate(stretch=lambda s, left, right: s),
    "the stretch multiplies by r alone, not by r − l": _gate(stretch=lambda s, left, right: s * right + left),
    "the stretch doesn't add l: it lies in (0, r − l)": _gate(
        stretch=lambda s, left, right: s * (right - left)
    ),
    "the noise isn't used: every gate is the usual one": _gate(noise=torch.zeros_like),
    "the noise has the wrong sign: log u − log(1 − u)": _gate(noise=lambda u: (1 - u).log() - u.log()),
    "u is added as it is; its logit log u − log(1 − u) is wanted": _gate(noise=lambda u: u),
    "the gates are rounded to 0 or 1: then α gets no gradient from them": _gate(
        clamp=lambda z: z.clamp(0, 1).round()
    ),
    "P(z ≠ 0) forgets the stretch: log(−l / r) is missing": _gate(chance=lambda a, left, right: a.sigmoid()),
    "log(−l / r) has the wrong sign, or l and r are exchanged": _gate(
        chance=lambda a, left, right: (a + math.log(-left / right)).sigmoid()
    ),
    "this is P(z = 0), the chance of a closed gate": _gate(
        chance=lambda a, left, right: 1 - (a - math.log(-left / right)).sigmoid()
    ),
    "the second result counts this one draw; it has no gradient. The formula needs no u": _counted,
    "the second result is the gate itself, not the chance that it isn't 0": _mean,
    "one chance for each gate is wanted, not their sum": _summed,
}


def _second_order(
    score: Callable[[Tensor, Tensor], Tensor], *, largest: bool = True
) -> Callable[..., Tensor]:
    def wrong_mask(gradients: Tensor, curvature: Tensor, k: int) -> Tensor:
        mask = torch.zeros(len(curvature), dtype=torch.bool)
        mask[score(gradients, curvature).argsort(descending=largest)[:k]] = True
        return mask

    return wrong_mask


SECOND_ORDER_MISTAKES = {
    "squared first, then summed: this is FISH's Σ g², over h": _second_order(
        lambda g, h: g.square().sum(0) / h
    ),
    "this is FISH: squared first, and no curvature": _second_order(lambda g, h: g.square().sum(0)),
    "the curvature is left out: this is (Σ g)² alone": _second_order(lambda g, h: g.sum(0).square()),
    "it multiplies by the curvature; a steep entry gains less, so divide": _second_order(
        lambda g, h: g.sum(0).square() * h
    ),
    "ranked by how far the entry would move, |Σ g| / h, not by how much the loss falls": _second_order(
        lambda g, h: g.sum(0).abs() / h
    ),
    "without the square, entries that should grow come last": _second_order(lambda g, h: g.sum(0) / h),
    "absolute values first, then summed: signs that cancel must cancel": _second_order(
        lambda g, h: g.abs().sum(0).square() / h
    ),
    "these entries gain least": _second_order(lambda g, h: g.sum(0).square() / h, largest=False),
    "summed over the entries instead of the examples": lambda gradients, curvature, k: torch.zeros(
        len(gradients), dtype=torch.bool
    ).index_fill(0, gradients.sum(1).square().argsort(descending=True)[:k], True),
    "these are places; return booleans, true for the chosen": lambda gradients, curvature, k: (
        gradients.sum(0).square() / curvature
    ).argsort(descending=True)[:k],
}


def _fall_at(step: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The quadratic's fall at another point than the joint optimum."""

    def wrong_fall(g: Tensor, H: Tensor, chosen: Tensor) -> Tensor:
        delta = step(g, H, chosen)
        return -(g @ delta + 0.5 * delta @ H @ delta)

    return wrong_fall


FALL_MISTAKES = {
    "each entry is counted alone, Σ g² / 2h: H couples them": lambda g, H, chosen: (
        0.5 * (g.square() / H.diagonal())[chosen].sum()
    ),
    "each entry goes where it alone would be best, −g / h; the best place is a joint one": _fall_at(
        lambda g, H, chosen: -(chosen * g) / H.diagonal()
    ),
    "the factor ½ is missing": lambda g, H, chosen: 2 * best_fall(g, H, chosen),
    "this is the change, which is negative; the fall is wanted": lambda g, H, chosen: (
        -best_fall(g, H, chosen)
    ),
    "H is inverted first and cut afterwards: cut H to the chosen rows and columns, then solve": (
        lambda g, H, chosen: 0.5 * g[chosen] @ torch.linalg.inv(H)[chosen][:, chosen] @ g[chosen]
    ),
    "all entries are solved for, and the others then set to 0: the chosen ones must be best by themselves": (
        _fall_at(lambda g, H, chosen: -(chosen * torch.linalg.solve(H, g)))
    ),
    "it multiplies by H instead of solving with it": lambda g, H, chosen: (
        0.5 * g[chosen] @ H[chosen][:, chosen] @ g[chosen]
    ),
    "these are the entries that aren't chosen": lambda g, H, chosen: best_fall(g, H, ~chosen),
    "nothing is left out: this is the fall if all entries may move": lambda g, H, chosen: (
        0.5 * g @ torch.linalg.solve(H, g)
    ),
    "this is the fall after a step of −g; the optimum is wanted": _fall_at(
        lambda g, H, chosen: -(chosen * g)
    ),
    "one number is wanted, the sum over the chosen entries": lambda g, H, chosen: (
        0.5 * g[chosen] * torch.linalg.solve(H[chosen][:, chosen], g[chosen])
    ),
}
