"""Output head and cross-entropy, forward and backward, against logits followed by `F.cross_entropy`, and against
torch's own `F.linear_cross_entropy` (2.13), which is given the labelled tokens alone, 128 or 256 at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor.bench.row import Row, Side, Step
from pefttutor.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

TOKENS, WIDTH, VOCABULARY = 1024, 512, 32_000


def build(side: Side, seed: int, device: str, *, ignored: float, chunk: int | None) -> Step:
    """A frozen head; `ignored` is the fraction of tokens without a label. The bound is the head's two products.

    chunk: how many tokens torch's own function takes at a time; None for the other peer.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(device).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.05
    weight = nn.Parameter(weight.to(device), requires_grad=False)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[torch.randperm(TOKENS, generator=generator)[: int(ignored * TOKENS)]] = -100
    labels = labels.to(device)
    if side == "bound":
        return lambda: _products(hidden.detach(), weight)
    kernel = linear_cross_entropy if side == "ours" else _peer(chunk)

    def step() -> dict[str, Tensor]:
        hidden.grad = None
        loss = kernel(hidden, weight, labels)
        loss.backward()
        assert hidden.grad is not None
        return {"loss": loss.detach(), "hidden": hidden.grad}

    return step


def _peer(chunk: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if chunk is None:
        return linear_cross_entropy_reference
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy, 2.13 has")
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)

    def labelled(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        kept = labels != -100
        return F.linear_cross_entropy(hidden[kept], weight, labels[kept], options=options)

    return labelled


def _products(hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
    return {"hidden": (hidden @ weight.t()) @ weight}


def _row(name: str, ignored: float, chunk: int | None = None, **goals: float) -> Row:
    return Row(
        name=name,
        work=f"output head + cross-entropy, T = {TOKENS}, V = {VOCABULARY}, d = {WIDTH}, {ignored:.0%} ignored",
        peer="logits, then F.cross_entropy"
        if chunk is None
        else f"F.linear_cross_entropy, {chunk} tokens at a time",
        build=partial(build, ignored=ignored, chunk=chunk),
        goals=goals,
        cuda_goals={"time": 1.0},
        bound="the head's two products, all tokens",
        rounds=9,
    )


ROWS = [
    _row("head_loss", 0.0, time=0.64, transient=0.08),
    _row("head_loss_half_ignored", 0.5, time=0.32, transient=0.08),
    *(_row(f"head_loss_torch{chunk}", 0.0, chunk, time=0.85) for chunk in (128, 256)),
    *(_row(f"head_loss_torch{chunk}_half_ignored", 0.5, chunk, time=0.85) for chunk in (128, 256)),
]
