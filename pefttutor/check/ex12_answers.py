"""Notebook 12: the right answers, and those that learners write instead, each with its name."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ---- the reference solutions


def lora_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, lora_alpha: float
) -> Tensor:
    """y = x W₀ᵀ + b + (α/r) · (x Aᵀ) Bᵀ          x (…, in) → (…, out)."""
    r = lora_A.shape[0]
    return F.linear(x, weight, bias) + lora_alpha / r * (x @ lora_A.T @ lora_B.T)


def merged_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, lora_alpha: float) -> Tensor:
    """W = W₀ + (α/r) · B A, added in float32 and rounded once, to the dtype of W₀          (out, in)."""
    r = lora_A.shape[0]
    delta = lora_alpha / r * (lora_B.float() @ lora_A.float())
    return (weight.float() + delta).to(weight.dtype)


def count_lora(model: nn.Module, r: int, target_modules: Collection[str]) -> int:
    """Σ r · (in + out) over the linear layers whose own name is among `target_modules`."""
    return sum(
        r * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[-1] in target_modules
    )


def truncate(lora_A: Tensor, lora_B: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Factors of rank k whose (α/k) · B' A' is the best rank-k approximation of (α/r) · B A, for every α."""
    r = lora_A.shape[0]
    U, sigma, Vh = torch.linalg.svd(lora_B @ lora_A, full_matrices=False)
    return Vh[:k], U[:, :k] * sigma[:k] * (k / r)


# ---- what learners write instead


def _forward(
    *,
    scaling: Callable[[float, int], float] = lambda alpha, r: alpha / r,
    bias: bool = True,
    base: bool = True,
) -> Callable[..., Tensor]:
    def wrong_forward(
        x: Tensor, weight: Tensor, bias_: Tensor | None, A: Tensor, B: Tensor, alpha: float
    ) -> Tensor:
        y = F.linear(x, weight, bias_ if bias else None)
        return (y if base else 0) + scaling(alpha, A.shape[0]) * (x @ A.T @ B.T)

    return lambda x, weight, bias, lora_A, lora_B, lora_alpha: wrong_forward(
        x, weight, bias, lora_A, lora_B, lora_alpha
    )


FORWARD_MISTAKES: dict[str, Callable[..., Any]] = {
    "the scaling α/r is missing": _forward(scaling=lambda alpha, r: 1.0),
    "the scaling is α, as in the chapter's equation 4.10, instead of α/r": _forward(
        scaling=lambda alpha, r: alpha
    ),
    "the scaling is α/√r: that is rsLoRA": _forward(scaling=lambda alpha, r: alpha / r**0.5),
    "the scaling is r/α: it is upside down": _forward(scaling=lambda alpha, r: r / alpha),
    "the bias is missing": _forward(bias=False),
    "only the low-rank branch is there: x W₀ᵀ + b is missing": _forward(base=False),
    "the scaling multiplies the base's output, too": lambda x, weight, bias, lora_A, lora_B, lora_alpha: (
        lora_alpha / lora_A.shape[0] * (F.linear(x, weight, bias) + x @ lora_A.T @ lora_B.T)
    ),
    "the bias is scaled, too": lambda x, weight, bias, lora_A, lora_B, lora_alpha: (
        F.linear(x, weight) + lora_alpha / lora_A.shape[0] * (x @ lora_A.T @ lora_B.T + bias)
    ),
    "the bias is added twice": lambda x, weight, bias, lora_A, lora_B, lora_alpha: (
        lora_forward(x, weight, bias, lora_A, lora_B, lora_alpha) + bias
    ),
    "r is taken from A's second side, which is `in`": lambda x, weight, bias, lora_A, lora_B, lora_alpha: (
        F.linear(x, weight, bias) + lora_alpha / lora_A.shape[1] * (x @ lora_A.T @ lora_B.T)
    ),
    "A is cut off from the graph (.data or .detach())": lambda x, weight, bias, lora_A, lora_B, lora_alpha: (
        lora_forward(x, weight, bias, lora_A.detach(), lora_B, lora_alpha)
    ),
    "B is cut off from the graph (.data or .detach())": lambda x, weight, bias, lora_A, lora_B, lora_alpha: (
        lora_forward(x, weight, bias, lora_A, lora_B.detach(), lora_alpha)
    ),
    "x is cut off from the graph: layers below would learn nothing": (
        lambda x, weight, bias, lora_A, lora_B, lora_alpha: lora_forward(
            x.detach(), weight, bias, lora_A, lora_B, lora_alpha
        )
    ),
    "A and B are swapped": lambda x, weight, bias, lora_A, lora_B, lora_alpha: (
        F.linear(x, weight, bias) + lora_alpha / lora_A.shape[0] * (x @ lora_B @ lora_A)
    ),
}

MERGE_MISTAKES: dict[str, Callable[..., Any]] = {
    "the scaling α/r is missing": lambda weight, lora_A, lora_B, lora_alpha: merged_weight(
        weight, lora_A, lora_B, lora_A.shape[0]
    ),
    "the scaling is α, as in the chapter's equation 4.10, instead of α/r": (
        lambda weight, lora_A, lora_B, lora_alpha: merged_weight(
            weight, lora_A, lora_B, lora_alpha * lora_A.shape[0]
        )
    ),
    "the scaling is α/√r: that is rsLoRA": lambda weight, lora_A, lora_B, lora_alpha: merged_weight(
        weight, lora_A, lora_B, lora_alpha * lora_A.shape[0] ** 0.5
    ),
    "ΔW is subtracted: that unmerges": lambda weight, lora_A, lora_B, lora_alpha: merged_weight(
        weight, lora_A, lora_B, -lora_alpha
    ),
    "this is ΔW alone: W₀ is missing": lambda weight, lora_A, lora_B, lora_alpha: merged_weight(
        torch.zeros_like(weight), lora_A, lora_B, lora_alpha
    ),
    "ΔW is rounded to the weight's dtype before it is added: add in float32, round once": (
        lambda weight, lora_A, lora_B, lora_alpha: (
            weight + (lora_alpha / lora_A.shape[0] * (lora_B @ lora_A)).to(weight.dtype)
        )
    ),
    "A and B are rounded to the weight's dtype before they are multiplied: multiply in float32, round once": (
        lambda weight, lora_A, lora_B, lora_alpha: (
            weight + lora_alpha / lora_A.shape[0] * (lora_B.to(weight.dtype) @ lora_A.to(weight.dtype))
        )
    ),
    "the result stays in float32, and the model's weight is in another dtype": (
        lambda weight, lora_A, lora_B, lora_alpha: merged_weight(weight.float(), lora_A, lora_B, lora_alpha)
    ),
    "the base weight is changed in place (+=, add_): nobody could unmerge any more": (
        lambda weight, lora_A, lora_B, lora_alpha: weight.copy_(
            merged_weight(weight, lora_A, lora_B, lora_alpha)
        )
    ),
}


def _count(
    each: Callable[[nn.Linear, int], int], named: Callable[[str, Collection[str]], bool] | None = None
) -> Callable[..., int]:
    match = named or (lambda name, targets: name.split(".")[-1] in targets)

    def wrong_count(model: nn.Module, r: int, target_modules: Collection[str]) -> int:
        layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        return sum(each(m, r) for n, m in layers if match(n, target_modules))

    return wrong_count


def _low_rank(layer: nn.Linear, r: int) -> int:
    return r * (layer.in_features + layer.out_features)


COUNT_MISTAKES: dict[str, Callable[..., Any]] = {
    "this counts r · in · out: the factors have r · in and out · r values": _count(
        lambda m, r: r * m.in_features * m.out_features
    ),
    "this counts in · out, the weight itself": _count(lambda m, r: m.in_features * m.out_features),
    "r is missing: A has r · in values, not in": _count(lambda m, r: m.in_features + m.out_features),
    "this is right for square layers only: A has r · in values, B has out · r": _count(
        lambda m, r: 2 * r * m.in_features
    ),
    "this counts one factor only": _count(lambda m, r: r * m.in_features),
    "the bias is counted, but it stays frozen": _count(lambda m, r: _low_rank(m, r) + m.out_features),
    "every linear layer is counted, whatever its name": _count(_low_rank, lambda name, targets: True),
    "a name counts when it contains a target; its last part must be equal to one": _count(
        _low_rank, lambda name, targets: any(target in name for target in targets)
    ),
    "a name counts when it ends in a target; its last part must be equal to one": _count(
        _low_rank, lambda name, targets: name.endswith(tuple(targets))
    ),
    "whole names are compared; only the last part (`name.split('.')[-1]`) is a target's name": _count(
        _low_rank, lambda name, targets: name in targets
    ),
    "the frozen weight is counted, too": _count(
        lambda m, r: _low_rank(m, r) + m.in_features * m.out_features
    ),
    "this is one number a layer; return their sum": lambda model, r, target_modules: [
        _low_rank(m, r)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name.split(".")[-1] in target_modules
    ],
}


def _cut(power: float, *, split: bool = False, last: bool = False) -> Callable[..., Any]:
    """B' scaled by (k/r)^power, in both factors when `split`, from the smallest singular values when `last`."""

    def wrong_cut(lora_A: Tensor, lora_B: Tensor, k: int) -> tuple[Tensor, Tensor]:
        U, sigma, Vh = torch.linalg.svd(lora_B @ lora_A, full_matrices=False)
        r, n = lora_A.shape[0], int((sigma > 1e-5 * sigma[0]).sum())
        chosen = slice(n - k, n) if last else slice(0, k)
        factor = (k / r) ** power
        A = Vh[chosen] * (factor if split else 1)
        return A, U[:, chosen] * sigma[chosen] * factor

    return wrong_cut


def _without_sigma(lora_A: Tensor, lora_B: Tensor, k: int) -> tuple[Tensor, Tensor]:
    U, _, Vh = torch.linalg.svd(lora_B @ lora_A, full_matrices=False)
    return Vh[:k], U[:, :k] * (k / lora_A.shape[0])


def _sigma_twice(lora_A: Tensor, lora_B: Tensor, k: int) -> tuple[Tensor, Tensor]:
    U, sigma, Vh = torch.linalg.svd(lora_B @ lora_A, full_matrices=False)
    return sigma[:k, None] * Vh[:k], U[:, :k] * sigma[:k] * (k / lora_A.shape[0])


TRUNCATE_MISTAKES: dict[str, Callable[..., Any]] = {
    "the scaling goes from α/r to α/k when the rank does, so B' (or A') must make up for it": _cut(0),
    "the correction is upside down: α/k is larger than α/r, so the factors must become smaller, by k/r": _cut(
        -1
    ),
    "both factors carry the whole correction k/r: their product has it twice": _cut(1, split=True),
    "the correction is √(k/r), and only one factor has it": _cut(0.5),
    "these are the smallest singular values; the best approximation keeps the largest": _cut(1, last=True),
    "the first k rows and columns of the factors aren't the best k directions: take the SVD of B A": (
        lambda lora_A, lora_B, k: (lora_A[:k], lora_B[:, :k] * (k / lora_A.shape[0]))
    ),
    "the first k rows of A and columns of B, as they are: take the SVD of B A, and mind α/k": (
        lambda lora_A, lora_B, k: (lora_A[:k], lora_B[:, :k])
    ),
    "the singular values are missing: U and Vᵀ alone have length 1": _without_sigma,
    "the singular values are in both factors, so they count twice": _sigma_twice,
}
