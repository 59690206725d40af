"""Notebook 15, the start, and 15b, the cheap norm: the right answers, and those that learners write instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# ---- the reference solutions


def row_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """‖w + s b A‖ of each row, of ‖w‖² + 2 s ⟨A w, b⟩ + s² b (A Aᵀ) bᵀ: nothing is as large as the weight."""
    cross = (weight @ lora_A.T * lora_B).sum(1)
    square = (lora_B @ (lora_A @ lora_A.T) * lora_B).sum(1)
    return (weight.norm(dim=1) ** 2 + 2 * scaling * cross + scaling**2 * square).sqrt()


def singular_start(weight: Tensor, r: int, scaling: float, minor: bool) -> tuple[Tensor, Tensor]:
    """A and B with s · B A = U_c S_c V_cᵀ of the r strongest or weakest triplets, the root of S in each."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    chosen = slice(len(S) - r, None) if minor else slice(r)
    root = (S[chosen] / scaling).sqrt()
    return root[:, None] * Vh[chosen], U[:, chosen] * root


# ---- what learners write instead


def _norms(
    *,
    cross: float = 2.0,
    power: int = 2,
    cross_power: int = 1,
    gram: bool = True,
    own: Callable[[Tensor], Tensor] = lambda weight: weight.norm(dim=1) ** 2,
    root: bool = True,
    use_square: bool = True,
) -> Callable[..., Tensor]:
    def wrong_norms(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        mixed = (weight @ lora_A.T * lora_B).sum(1)
        middle = lora_A @ lora_A.T if gram else torch.eye(len(lora_A))
        square = (lora_B @ middle * lora_B).sum(1) if use_square else 0
        total = own(weight) + cross * scaling**cross_power * mixed + scaling**power * square
        return total.sqrt() if root else total

    return wrong_norms


NORM_MISTAKES: dict[str, Callable[..., Any]] = {
    "W + s B A, B A or W² is made: weight.norm(dim=1) gives ‖w‖, and W Aᵀ comes before B": (
        lambda weight, lora_A, lora_B, scaling: (weight + scaling * lora_B @ lora_A).norm(dim=1)
    ),
    "the mixed term stands twice in (a + b)²": _norms(cross=1.0),
    "the mixed term is missing": _norms(cross=0.0),
    "the mixed term has a plus": _norms(cross=-2.0),
    "s is squared in the last term": _norms(power=1),
    "s isn't squared in the mixed term": _norms(cross_power=2),
    "the scaling s is missing": _norms(power=0, cross_power=0),
    "the last term is missing": _norms(use_square=False),
    "A Aᵀ is left out: that is right only if A's rows are orthonormal": _norms(gram=False),
    "‖w‖ isn't squared": _norms(own=lambda weight: weight.norm(dim=1)),
    "the root is missing": _norms(root=False),
    "these are W's own norms": lambda weight, lora_A, lora_B, scaling: weight.norm(dim=1),
}


def _start(
    *,
    choose: Callable[[int, int, bool], slice] = lambda n, r, minor: slice(n - r, None) if minor else slice(r),
    in_A: float = 0.5,
    in_B: float = 0.5,
    s_A: float = 0.5,
    s_B: float = 0.5,
    transposed: bool = False,
) -> Callable[..., Any]:
    """in_A, in_B: the power of S in each factor; s_A, s_B: that of 1/s."""

    def wrong_start(weight: Tensor, r: int, scaling: float, minor: bool) -> tuple[Tensor, Tensor]:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        chosen = choose(len(S), r, minor)
        right = Vh[:, chosen].T if transposed else Vh[chosen]
        A = (S[chosen] ** in_A / scaling**s_A)[:, None] * right
        return A, U[:, chosen] * (S[chosen] ** in_B / scaling**s_B)

    return wrong_start


START_MISTAKES: dict[str, Callable[..., Any]] = {
    "`minor` is the wrong way round": _start(
        choose=lambda n, r, minor: slice(r) if minor else slice(n - r, None)
    ),
    "`minor` is ignored: these are always the strongest": _start(choose=lambda n, r, minor: slice(r)),
    "these are always the weakest": _start(choose=lambda n, r, minor: slice(n - r, None)),
    "all of S lies in B; each factor gets its root": _start(in_A=0.0, in_B=1.0, s_A=0.0, s_B=1.0),
    "all of S lies in A; each factor gets its root": _start(in_A=1.0, in_B=0.0, s_A=1.0, s_B=0.0),
    "S stands in both factors, so that it counts twice: take its root": _start(in_A=1.0, in_B=1.0),
    "the singular values are missing": _start(in_A=0.0, in_B=0.0),
    "s is left out: s · B A would be s times too large": _start(s_A=0.0, s_B=0.0),
    "the factors are multiplied by the root of s; divide": _start(s_A=-0.5, s_B=-0.5),
    "each factor is divided by s; its root is enough": _start(s_A=1.0, s_B=1.0),
    "s is divided out of one factor only, by its root": _start(s_A=0.0),
    "svd gives Vᵀ: its rows are the directions, not its columns": _start(transposed=True),
    "the r weakest begin one place too early": _start(
        choose=lambda n, r, minor: slice(n - r - 1, n - 1) if minor else slice(r)
    ),
}
