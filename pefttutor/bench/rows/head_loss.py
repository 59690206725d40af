"""Output head and cross-entropy, forward and backward, against logits followed by `F.cross_entropy`."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from pefttutor.bench.row import Row, Side, Step
from pefttutor.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

TOKENS, WIDTH, VOCABULARY = 1024, 512, 32_000


def build(side: Side, seed: int, *, ignored: float) -> Step:
    """A frozen head; `ignored` is the fraction of tokens without a label. The bound is the head's two products."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).requires_grad_()
    weight = nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.05, requires_grad=False)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[torch.randperm(TOKENS, generator=generator)[: int(ignored * TOKENS)]] = -100
    if side == "bound":
        return lambda: _products(hidden.detach(), weight)
    kernel = linear_cross_entropy if side == "ours" else linear_cross_entropy_reference

    def step() -> dict[str, Tensor]:
        hidden.grad = None
        loss = kernel(hidden, weight, labels)
        loss.backward()
        assert hidden.grad is not None
        return {"loss": loss.detach(), "hidden": hidden.grad}

    return step


def _products(hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
    return {"hidden": (hidden @ weight.t()) @ weight}


def _row(name: str, ignored: float, **goals: float) -> Row:
    return Row(
        name=name,
        work=f"output head + cross-entropy, T = {TOKENS}, V = {VOCABULARY}, d = {WIDTH}, {ignored:.0%} ignored",
        peer="logits, then F.cross_entropy",
        build=partial(build, ignored=ignored),
        goals=goals,
        bound="the head's two products, all tokens",
        rounds=9,
    )


ROWS = [
    _row("head_loss", 0.0, time=0.68, transient=0.10),
    _row("head_loss_half_ignored", 0.5, time=0.36, transient=0.10),
]
