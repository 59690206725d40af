"""Notebook 12, LoRA: the forward pass, merging, counting, and cutting a trained update to a smaller rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.check.compare import same_result
from pefttutor.check.core import call, exercise, wrong
from pefttutor.check.ex12_answers import (
    COUNT_MISTAKES,
    FORWARD_MISTAKES,
    MERGE_MISTAKES,
    TRUNCATE_MISTAKES,
    count_lora,
    lora_forward,
    merged_weight,
    truncate,
)
from pefttutor.check.values import describe, draw, fresh


@exercise("12.1", reference=lora_forward)
def ex12_1(attempt: Any) -> None:
    """Values and gradients, for a batch of sequences and for one vector, through a layer that isn't square."""
    for leading, alpha in (((2, 3), 6.0), ((), 5.0)):
        inputs = {
            "x": draw(*leading, 5, seed=1),
            "weight": draw(7, 5, seed=2),
            "bias": draw(7, seed=3),
            "lora_A": draw(4, 5, seed=4),
            "lora_B": draw(7, 4, seed=5),
            "lora_alpha": alpha,
        }
        same_result(
            attempt, lora_forward, inputs, gradients=("x", "lora_A", "lora_B"), mistakes=FORWARD_MISTAKES
        )
    same_result(attempt, lora_forward, inputs | {"bias": None})


@exercise("12.2", reference=merged_weight)
def ex12_2(attempt: Any) -> None:
    """In float32; then in bfloat16, bit for bit: one rounding too many shows there."""
    inputs = {
        "weight": draw(7, 5, seed=2),
        "lora_A": draw(4, 5, seed=4),
        "lora_B": draw(7, 4, seed=5),
        "lora_alpha": 6.0,
    }
    same_result(attempt, merged_weight, inputs, mistakes=MERGE_MISTAKES)
    # A seed for which no sum lies so near the middle of two bfloat16 numbers that its order matters.
    half = {
        "weight": draw(12, 10, seed=160).bfloat16(),
        "lora_A": draw(4, 10, seed=7) / 7,
        "lora_B": draw(12, 4, seed=8) / 7,
        "lora_alpha": 6.0,
    }
    # An error of one bit in bfloat16 is 2⁻⁸ of the number; sums in another order move float32 by 2⁻²² only.
    same_result(attempt, merged_weight, half, mistakes=MERGE_MISTAKES, rtol=2e-3)


class _Block(nn.Module):
    """Names that contain, begin and end like targets, and layers that aren't square."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(6, 6), nn.Linear(6, 4)
        self.v_proj = nn.Linear(6, 10)
        self.qv_proj = nn.Linear(6, 8)
        self.v_proj_norm = nn.Linear(6, 3)
        self.up_proj = nn.Linear(6, 20, bias=False)


def _small_model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        model = nn.ModuleDict({"embed": nn.Embedding(11, 6)})
        model["layers"] = nn.ModuleList(_Block() for _ in range(3))
        model["score"] = nn.Linear(6, 2)
    return model


@exercise("12.3", reference=count_lora)
def ex12_3(attempt: Any) -> None:
    """Two choices of layers; the model must come out as it went in, and nothing may be attached to count."""
    for r, targets in ((3, ("q_proj", "v_proj")), (5, ("up_proj",))):
        inputs = {"model": _small_model(), "r": r, "target_modules": targets}
        same_result(attempt, count_lora, inputs, mistakes=COUNT_MISTAKES)


@exercise("12.4", reference=truncate)
def ex12_4(attempt: Any) -> None:
    """Whatever factors come, what counts is their product with the new scaling α/k."""
    for k in (2, 1):
        inputs = {"lora_A": draw(4, 6, seed=9), "lora_B": draw(9, 4, seed=10), "k": k}
        came = call(attempt, **fresh(inputs))
        wanted = {"A'": (k, 6), "B'": (9, k)}
        if not _has_shapes(came, [*wanted.values()]):
            expected = ", ".join(f"{name} {shape}" for name, shape in wanted.items())
            raise wrong(
                input=f"lora_A (4, 6), lora_B (9, 4), k {k}",
                expected=f"a tuple: {expected}",
                came=describe(came),
                likely=_likely_shape(came, k),
            )
        same_result(
            _product(attempt),
            _product(truncate),
            inputs,
            mistakes={name: _product(mistake) for name, mistake in TRUNCATE_MISTAKES.items()},
        )


def _product(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """ΔW of what `function` gives, at lora_alpha = 1: B' A' / k."""

    def delta(lora_A: Tensor, lora_B: Tensor, k: int) -> Tensor:
        A, B = function(lora_A=lora_A, lora_B=lora_B, k=k)
        return B @ A / k

    return delta


def _has_shapes(came: Any, wanted: list[tuple[int, int]]) -> bool:
    return isinstance(came, tuple | list) and [getattr(part, "shape", None) for part in came] == wanted


def _likely_shape(came: Any, k: int) -> str | None:
    if came is None:
        return "the function doesn't return its result"
    if isinstance(came, Tensor):
        return "this is the matrix ΔW; return the two factors"
    shapes = [tuple(getattr(part, "shape", ())) for part in came] if isinstance(came, tuple | list) else []
    if shapes == [(9, k), (k, 6)]:
        return "A' and B' are returned in the wrong order: A' first"
    if shapes == [(4, 6), (9, 4)]:
        return "the factors still have the old rank"
    if len(shapes) == 2 and (6, k) in shapes:
        return "A' is transposed: svd returns Vᵀ already"
    return None
