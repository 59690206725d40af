"""AdapterFusion's attention alone, forward and backward, against the form that the library `adapters` has."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from pefttutor.bench.row import Row, Side, Step
from pefttutor.kernels.fusion_attention import fusion_attention, fusion_attention_reference

WIDTH, TOKENS = 768, 1024
NAMES = ("h", "z", "query", "query_bias", "key", "value")


def build(side: Side, seed: int, device: str, *, adapters: int) -> Step:
    """What so many adapters say of 1,024 tokens is weighed. The bound is the product with V, which each side needs."""
    generator = torch.Generator().manual_seed(seed)
    d = WIDTH
    shapes = ((TOKENS, d), (TOKENS, adapters, d), (d, d), (d,), (d, d), (d, d))
    leaves = [torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for shape in shapes]
    inputs = dict(zip(NAMES, [leaf.to(device).requires_grad_() for leaf in leaves], strict=True))
    incoming = torch.randn(TOKENS, d, generator=generator).to(device)
    if side == "bound":
        return lambda: _step(partial(nn.functional.linear, inputs["h"], inputs["value"]), incoming, inputs)
    kernel = fusion_attention if side == "ours" else fusion_attention_reference
    return lambda: _step(partial(kernel, **inputs), incoming, inputs)


def _step(forward: partial[Tensor], incoming: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    for leaf in leaves.values():
        leaf.grad = None
    y = forward()
    y.backward(incoming)
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def _row(adapters: int, time: float) -> Row:
    return Row(
        name=f"fusion_attention_{adapters}",
        work=f"attention over {adapters} adapters, forward + backward, d = {WIDTH}, T = {TOKENS}",
        peer="keys and values of all adapters, as in `adapters`",
        build=partial(build, adapters=adapters),
        goals={"time": time},
        cuda_goals={"time": 1.0},
        bound="the product with V alone",
        tolerance=1e-3,
    )


ROWS = [_row(4, 0.35), _row(8, 0.20)]
