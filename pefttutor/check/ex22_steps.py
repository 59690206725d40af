"""Notebook 22c, rate and rank: LoRA's first step, and what learners write instead, each with its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

# ---- the reference solution


def first_step(G: Tensor, A: Tensor, s: float, lr: float) -> Tensor:
    """ΔW after Adam's first step from B = 0: B is −η sign(s G Aᵀ) then, A still what it was.

    ΔW = s B A = −s η sign(G Aᵀ) A

    Shapes: G = ∂L/∂W (out, in), A (r, in) → (out, in).
    """
    return s * _b(G, A, lr) @ A


def _b(G: Tensor, A: Tensor, lr: float) -> Tensor:
    return -lr * (G @ A.T).sign()


# ---- what learners write instead

STEP_MISTAKES: dict[str, Callable[..., Any]] = {
    "this is a step of plain gradient descent; Adam's first step has the length η in every entry": (
        lambda G, A, s, lr: -s * lr * (s * G @ A.T) @ A
    ),
    "the step leads uphill: mind the sign": lambda G, A, s, lr: -first_step(G, A, s, lr),
    "s is missing: the change is s B A": lambda G, A, s, lr: _b(G, A, lr) @ A,
    "s counts once: Adam's sign has forgotten the one in B's gradient": (
        lambda G, A, s, lr: s * first_step(G, A, s, lr)
    ),
    "this divides by s: the factor is α/r, not r/α": lambda G, A, s, lr: first_step(G, A, s, lr) / s**2,
    "this is B; the change is s B A": lambda G, A, s, lr: _b(G, A, lr),
    "the rate is missing": lambda G, A, s, lr: first_step(G, A, s, 1.0),
    "this is the sign of G; B's gradient is s G Aᵀ": lambda G, A, s, lr: -s * lr * (G.sign() @ A.T) @ A,
    "the sign is taken of the whole product; Adam takes that of B's gradient": (
        lambda G, A, s, lr: -s * lr * (G @ A.T @ A).sign()
    ),
    "this is a step of full fine-tuning": lambda G, A, s, lr: -lr * G.sign(),
    "A moves here, too: while B is 0, its gradient s Bᵀ G is": (
        lambda G, A, s, lr: s * _b(G, A, lr) @ (A - lr * (_b(G, A, lr).T @ G).sign())
    ),
    "it is divided by r, which s contains already": lambda G, A, s, lr: first_step(G, A, s, lr) / len(A),
    "each row of the gradient is scaled to length 1; Adam scales each entry": (
        lambda G, A, s, lr: -s * lr * (G @ A.T) / (G @ A.T).norm(dim=1, keepdim=True) @ A
    ),
    "this is how far the loss falls; return the change of W": (
        lambda G, A, s, lr: -(G * first_step(G, A, s, lr)).sum()
    ),
}
