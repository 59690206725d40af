"""Notebook 16, LoRAHub: the two sums: right answers, and those that learners write instead, each with its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Weights = Callable[[Tensor], Tensor]

# ---- 16.1: the sum of the factors


def sum_factors(A: Tensor, B: Tensor, w: Tensor, s: float) -> Tensor:
    """ΔW = s (Σ wₙ Bₙ)(Σ wₙ Aₙ)."""
    return s * torch.einsum("n,nor->or", w, B) @ torch.einsum("n,nri->ri", w, A)


def _products(weights: Weights) -> Callable[..., Tensor]:
    """Each plug-in's own product, weighted."""

    def wrong_sum(A: Tensor, B: Tensor, w: Tensor, s: float) -> Tensor:
        return s * torch.einsum("n,nor,nri->oi", weights(w), B, A)

    return wrong_sum


def _apart(in_A: Weights, in_B: Weights, factor: Callable[[float, int], float]) -> Callable[..., Tensor]:
    def wrong_sum(A: Tensor, B: Tensor, w: Tensor, s: float) -> Tensor:
        summed_B = torch.einsum("n,nor->or", in_B(w), B)
        return factor(s, len(w)) * summed_B @ torch.einsum("n,nri->ri", in_A(w), A)

    return wrong_sum


def _signed_root(w: Tensor) -> Tensor:
    return w.sign() * w.abs().sqrt()


FACTOR_MISTAKES: dict[str, Callable[..., Any]] = {
    "the weights are missing in B: they multiply both factors": _apart(
        lambda w: w, torch.ones_like, lambda s, n: s
    ),
    "the weights are missing in A: they multiply both factors": _apart(
        torch.ones_like, lambda w: w, lambda s, n: s
    ),
    "the weights are missing": _apart(torch.ones_like, torch.ones_like, lambda s, n: s),
    "each plug-in's own product is weighted and summed: sum the factors first, then multiply": _products(
        lambda w: w
    ),
    "this is Σ w² B A: the products of one plug-in's B and another's A are missing": _products(
        lambda w: w * w
    ),
    "s is missing": _apart(lambda w: w, lambda w: w, lambda s, n: 1.0),
    "s is there twice, once for each factor": _apart(lambda w: w, lambda w: w, lambda s, n: s * s),
    "this is the mean over the plug-ins in both factors: sum": _apart(
        lambda w: w / len(w), lambda w: w / len(w), lambda s, n: s
    ),
    "the product is divided by the number of plug-ins": _apart(lambda w: w, lambda w: w, lambda s, n: s / n),
    "the weights are normalised to a sum of 1: take them as they are": _apart(
        lambda w: w / w.sum(), lambda w: w / w.sum(), lambda s, n: s
    ),
    "the weights are put through a softmax: take them as they are": _apart(
        lambda w: w.softmax(0), lambda w: w.softmax(0), lambda s, n: s
    ),
    "this is √|w| in each factor, as in HF PEFT's 'linear'; the released code multiplies each by w": _apart(
        lambda w: w.abs().sqrt(), _signed_root, lambda s, n: s
    ),
    "the weights lose their signs": _apart(torch.abs, torch.abs, lambda s, n: s),
    "the weights are cut off from the graph (.data or .detach())": _apart(
        lambda w: w.detach(), lambda w: w.detach(), lambda s, n: s
    ),
    "the factors are cut off from the graph (.data or .detach())": lambda A, B, w, s: sum_factors(
        A.detach(), B.detach(), w, s
    ),
    "this is ΔWᵀ: with B (out, r) and A (r, in) it is B A": lambda A, B, w, s: sum_factors(A, B, w, s).T,
}

# ---- 16.2: side by side


def beside(A: Tensor, B: Tensor, w: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """One A (N·r, in) and one B (out, N·r), whose product is Σ wₙ s Bₙ Aₙ."""
    return A.flatten(0, 1), torch.cat([s * each * b for each, b in zip(w, B, strict=True)], 1)


def _beside(
    in_A: Weights = torch.ones_like,
    in_B: Weights = lambda w: w,
    factor: Callable[[float, int], float] = lambda s, n: s,
) -> Callable[..., tuple[Tensor, Tensor]]:
    def wrong_pair(A: Tensor, B: Tensor, w: Tensor, s: float) -> tuple[Tensor, Tensor]:
        A = in_A(w)[:, None, None] * A
        return A.flatten(0, 1), torch.cat([*(factor(s, len(w)) * in_B(w)[:, None, None] * B)], 1)

    return wrong_pair


BESIDE_MISTAKES: dict[str, Callable[..., Any]] = {
    "the weights multiply both factors, so that they are squared: one factor is enough": _beside(
        in_A=lambda w: w
    ),
    "the weights are missing": _beside(in_B=torch.ones_like),
    "s is missing": _beside(factor=lambda s, n: 1.0),
    "s is there twice": _beside(factor=lambda s, n: s * s),
    "the weights lose their signs": _beside(in_B=torch.abs),
    "the weights are normalised to a sum of 1: take them as they are": _beside(in_B=lambda w: w / w.sum()),
    "this is the mean over the plug-ins: sum": _beside(factor=lambda s, n: s / n),
    "B is reshaped, which mixes its rows: put the N matrices beside each other, along dim=1": (
        lambda A, B, w, s: (A.flatten(0, 1), (s * w[:, None, None] * B).reshape(B.shape[1], -1))
    ),
    "the plug-ins stand in another order in B than in A": lambda A, B, w, s: (
        A.flatten(0, 1),
        torch.cat([*(s * w[:, None, None] * B).flip(0)], 1),
    ),
    "the weights meet other plug-ins than their own": lambda A, B, w, s: beside(A, B, w.roll(1), s),
    "A's rows are interleaved: keep each plug-in's rows together, as its columns of B are": (
        lambda A, B, w, s: (A.transpose(0, 1).flatten(0, 1), beside(A, B, w, s)[1])
    ),
}
