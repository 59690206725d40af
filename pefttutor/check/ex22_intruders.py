"""Notebook 22b, intruder dimensions: the right answers, and those that learners write instead, each with its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# ---- the reference solutions


def intruders(before: Tensor, after: Tensor, top: int = 10, epsilon: float = 0.5) -> list[int]:
    """Which of the `top` first left singular vectors of `after` have |cos| < epsilon with every one of `before`."""
    return _chosen(_cosines(before, after, top).abs().amax(1) < epsilon)


def shrunk(after: Tensor, which: Sequence[int], keep: float) -> Tensor:
    """W − (1 − keep) Σ_{i in which} σ_i u_i v_iᵀ: the singular values of these directions, times `keep`."""
    U, sigma, Vh = torch.linalg.svd(after, full_matrices=False)
    factor = torch.ones_like(sigma)
    factor[list(which)] = keep
    return (U * (factor * sigma)) @ Vh


def stepped_back(before: Tensor, after: Tensor, shorter: Tensor) -> Tensor:
    """From `after` towards `before`, as far as `shorter` is away from `after`, but not beyond `before`."""
    change = after - before
    if not change.any():
        return after.clone()
    return after - change * min(1.0, float((after - shorter).norm() / change.norm()))


def _left(weight: Tensor) -> Tensor:
    return torch.linalg.svd(weight, full_matrices=False).U


def _cosines(before: Tensor, after: Tensor, top: int | None = None) -> Tensor:
    """Of each left singular vector of `after` with all those of `before`. Shapes: → (top, all)."""
    return _left(after)[:, :top].T @ _left(before)


def _chosen(far: Tensor) -> list[int]:
    return far.nonzero().flatten().tolist()


# ---- what learners write instead


def _right_vectors(before: Tensor, after: Tensor, top: int, epsilon: float) -> list[int]:
    V0, V = (torch.linalg.svd(w, full_matrices=False).Vh for w in (before, after))
    return _chosen((V[:top] @ V0.T).abs().amax(1) < epsilon)


INTRUDERS_MISTAKES: dict[str, Callable[..., Any]] = {
    "these are the right singular vectors, of the input side": _right_vectors,
    "the sign counts: u and −u are the same direction, so take the absolute cosine": (
        lambda before, after, top, epsilon: _chosen(_cosines(before, after, top).amax(1) < epsilon)
    ),
    "the mean cosine is compared; one near relative is enough": lambda before, after, top, epsilon: _chosen(
        _cosines(before, after, top).abs().mean(1) < epsilon
    ),
    "the i-th is compared with the i-th alone: an old direction may have changed its place": (
        lambda before, after, top, epsilon: _chosen(_cosines(before, after).diag().abs()[:top] < epsilon)
    ),
    "only the first `top` of the old directions are looked at; compare with all": (
        lambda before, after, top, epsilon: _chosen(
            _cosines(before, after, top)[:, :top].abs().amax(1) < epsilon
        )
    ),
    "all directions are searched, not the `top` first": lambda before, after, top, epsilon: _chosen(
        _cosines(before, after).abs().amax(1) < epsilon
    ),
    "these are the ones that are like an old one": lambda before, after, top, epsilon: _chosen(
        _cosines(before, after, top).abs().amax(1) >= epsilon
    ),
    "these are directions of ΔW; decompose the whole weight after training": (
        lambda before, after, top, epsilon: intruders(before, after - before, top, epsilon)
    ),
    "before and after are swapped: these are old directions that have gone": (
        lambda before, after, top, epsilon: intruders(after, before, top, epsilon)
    ),
    "singular vectors are the columns of U, and these are its rows": lambda before, after, top, epsilon: (
        _chosen((_left(after)[:top] @ _left(before).T).abs().amax(1) < epsilon)
    ),
    "this is how many there are; return which": lambda before, after, top, epsilon: len(
        intruders(before, after, top, epsilon)
    ),
}


def _part(after: Tensor, which: Sequence[int]) -> Tensor:
    """Σ_{i in which} σ_i u_i v_iᵀ."""
    U, sigma, Vh = torch.linalg.svd(after, full_matrices=False)
    return (U[:, list(which)] * sigma[list(which)]) @ Vh[list(which)]


def _without_sigma(after: Tensor, which: Sequence[int], keep: float) -> Tensor:
    U, _, Vh = torch.linalg.svd(after, full_matrices=False)
    return after - (1 - keep) * U[:, list(which)] @ Vh[list(which)]


SHRUNK_MISTAKES: dict[str, Callable[..., Any]] = {
    "keep is taken away; what must go is 1 − keep": lambda after, which, keep: (
        after - keep * _part(after, which)
    ),
    "the directions are taken away whole": lambda after, which, keep: after - _part(after, which),
    "the directions grow: mind the sign": lambda after, which, keep: after + (1 - keep) * _part(after, which),
    "the singular values are missing: the step is (1 − keep) · σ along each": _without_sigma,
    "this is the part of these directions alone": lambda after, which, keep: keep * _part(after, which),
    "the whole weight is shrunk": lambda after, which, keep: keep * after if which else after.clone(),
    "the first directions are shrunk, as many as there are, instead of these": lambda after, which, keep: (
        shrunk(after, range(len(which)), keep)
    ),
    "all other directions are shrunk, and these kept": lambda after, which, keep: shrunk(
        after, [i for i in range(min(after.shape)) if i not in which], keep
    ),
    "keep is squared: it scales σ once": lambda after, which, keep: shrunk(after, which, keep * keep),
    "the trained weight is changed in place; the caller still needs it": lambda after, which, keep: (
        after.copy_(shrunk(after, which, keep))
    ),
}


def _scaled(length: Callable[[Tensor, Tensor, Tensor], Tensor], *, cap: bool = True) -> Callable[..., Any]:
    def wrong(before: Tensor, after: Tensor, shorter: Tensor) -> Tensor:
        share = float(length(before, after, shorter) / (after - before).norm())
        return after - (after - before) * (min(1.0, share) if cap else share)

    return wrong


BACK_MISTAKES: dict[str, Callable[..., Any]] = {
    "the step isn't bounded: it may go beyond `before`": _scaled(
        lambda before, after, shorter: (after - shorter).norm(), cap=False
    ),
    "as far as `shorter` is from `before`; its distance from `after` is asked for": _scaled(
        lambda before, after, shorter: (before - shorter).norm()
    ),
    "this is the squared length": _scaled(lambda before, after, shorter: (after - shorter).square().sum()),
    "this is the largest singular value of the step; its length is the root of the summed squares": _scaled(
        lambda before, after, shorter: torch.linalg.matrix_norm(after - shorter, ord=2)
    ),
    "this is the sum of absolute values; the length is the root of the summed squares": _scaled(
        lambda before, after, shorter: (after - shorter).abs().sum()
    ),
    "the step leads away from `before`": lambda before, after, shorter: (
        2 * after - stepped_back(before, after, shorter)
    ),
    "the step starts at `before`": lambda before, after, shorter: (
        before + after - stepped_back(before, after, shorter)
    ),
    "the length is missing: this goes all the way to `before`": lambda before, after, shorter: before.clone(),
    "this is `shorter` itself": lambda before, after, shorter: shorter.clone(),
    "the change has the length 1 here; divide by its length, not by the step's": (
        lambda before, after, shorter: after - (after - before) * float((after - shorter).norm())
    ),
    "the trained weight is changed in place; the caller still needs it": lambda before, after, shorter: (
        after.copy_(stepped_back(before, after, shorter))
    ),
}
