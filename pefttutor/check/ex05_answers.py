"""Notebook 05, one adapter: the right answers, and those that learners write instead, each with its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Map = Callable[[Tensor], Tensor]

# ---- the reference solutions


class Bottleneck(nn.Module):
    """A(h) = s · (gelu(h W_dᵀ + b_d) W_uᵀ + b_u), with W_u = 0 and b_u = 0 at the start.   (…, d) → (…, d)."""

    def __init__(self, width: int, m: int, scaling: float, generator: torch.Generator) -> None:
        super().__init__()
        self.scaling = scaling
        drawn = [nn.Parameter(value) for value in start(width, m, generator)]
        self.down, self.down_bias, self.up, self.up_bias = drawn

    def forward(self, h: Tensor) -> Tensor:
        return bottleneck(h, self.down, self.down_bias, self.up, self.up_bias, self.scaling)


def bottleneck(
    h: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, scaling: float
) -> Tensor:
    """The formula alone."""
    narrow = F.gelu(h @ down.T + down_bias)  # (…, m)
    return scaling * (narrow @ up.T + up_bias)


def start(width: int, m: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_d uniform in ±1/√d and b_d = 0; W_u = 0 and b_u = 0.   → (m, d), (m), (d, m), (d)."""
    down = (2 * torch.rand(m, width, generator=generator) - 1) / width**0.5
    return down, torch.zeros(m), torch.zeros(width, m), torch.zeros(width)


def adapted_sublayer(f: Map, x: Tensor, adapter: Map, placement: str) -> Tensor:
    """serial: f(x) + A(f(x));  parallel: f(x) + A(x)."""
    h = f(x)
    return h + adapter(h if placement == "serial" else x)


# ---- what learners write instead

FORMULA_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "the nonlinearity is missing: without it the two layers are one thin linear layer": (
        lambda h, down, down_bias, up, up_bias, scaling: scaling * ((h @ down.T + down_bias) @ up.T + up_bias)
    ),
    "the nonlinearity comes after the second layer; it stands in the middle": (
        lambda h, down, down_bias, up, up_bias, scaling: (
            scaling * F.gelu((h @ down.T + down_bias) @ up.T + up_bias)
        )
    ),
    "the nonlinearity is relu; gelu is wanted": (
        lambda h, down, down_bias, up, up_bias, scaling: (
            scaling * (F.relu(h @ down.T + down_bias) @ up.T + up_bias)
        )
    ),
    "the bias in the middle, b_d, is forgotten": (
        lambda h, down, down_bias, up, up_bias, scaling: scaling * (F.gelu(h @ down.T) @ up.T + up_bias)
    ),
    "b_d is added after the nonlinearity; it comes before": (
        lambda h, down, down_bias, up, up_bias, scaling: (
            scaling * ((F.gelu(h @ down.T) + down_bias) @ up.T + up_bias)
        )
    ),
    "the last bias, b_u, is forgotten": (
        lambda h, down, down_bias, up, up_bias, scaling: scaling * (F.gelu(h @ down.T + down_bias) @ up.T)
    ),
    "the factor s is forgotten": (
        lambda h, down, down_bias, up, up_bias, scaling: F.gelu(h @ down.T + down_bias) @ up.T + up_bias
    ),
    "s multiplies the product alone; b_u stands in the bracket, too": (
        lambda h, down, down_bias, up, up_bias, scaling: (
            scaling * (F.gelu(h @ down.T + down_bias) @ up.T) + up_bias
        )
    ),
    "s stands inside the nonlinearity": (
        lambda h, down, down_bias, up, up_bias, scaling: (
            F.gelu(scaling * (h @ down.T + down_bias)) @ up.T + up_bias
        )
    ),
    "this divides by s": (
        lambda h, down, down_bias, up, up_bias, scaling: (
            (F.gelu(h @ down.T + down_bias) @ up.T + up_bias) / scaling
        )
    ),
    "h is added here; A(h) alone is wanted, and the place adds it": (
        lambda h, down, down_bias, up, up_bias, scaling: (
            h + scaling * (F.gelu(h @ down.T + down_bias) @ up.T + up_bias)
        )
    ),
    "no gradient reaches h: it is detached": (
        lambda h, down, down_bias, up, up_bias, scaling: bottleneck(
            h.detach(), down, down_bias, up, up_bias, scaling
        )
    ),
}


def _start(
    *,
    down: Callable[[Tensor, int, int], Tensor] = lambda u, m, d: u / d**0.5,
    up: Callable[[Tensor], Tensor] = torch.zeros_like,
    up_bias: float = 0.0,
) -> Callable[..., Any]:
    def wrong_start(width: int, m: int, generator: torch.Generator | None) -> Any:
        uniform = 2 * torch.rand(m, width, generator=generator) - 1
        drawn = torch.randn(width, m, generator=generator)
        return down(uniform, m, width), torch.zeros(m), up(drawn), torch.full((width,), up_bias)

    return wrong_start


START_MISTAKES: dict[str, Callable[..., Any]] = {
    "W_u is as large as in any new layer, so that the model is disturbed: it starts at zero": _start(
        up=lambda drawn: drawn / drawn.shape[1] ** 0.5
    ),
    "W_u is small, not zero: near the base, not exactly on it": _start(up=lambda drawn: 1e-3 * drawn),
    "W_u is one number everywhere, and not zero": _start(up=torch.ones_like),
    "both matrices are zero: then neither ever gets a gradient": _start(
        down=lambda u, m, d: torch.zeros_like(u)
    ),
    "the zero is in W_d; W_u is the one": _start(
        down=lambda u, m, d: torch.zeros_like(u), up=lambda drawn: 0.1 * drawn
    ),
    "all rows of W_d are alike, so that the m features never differ": _start(
        down=lambda u, m, d: (u[:1] / d**0.5).expand(m, d).clone()
    ),
    "the range of W_d is 1/√m; it has d inputs": _start(down=lambda u, m, d: u / m**0.5),
    "the range of W_d is ±1: too wide for d inputs": _start(down=lambda u, m, d: u),
    "W_d has no negative numbers: the range is ±1/√d": _start(down=lambda u, m, d: (u + 1) / 2 / d**0.5),
    "b_u isn't zero": _start(up_bias=1.0),
    "the matrices are transposed: W_d is (m, d) and W_u (d, m)": lambda width, m, generator: tuple(
        t.T if t.dim() == 2 else t for t in start(width, m, generator)
    ),
    "the generator isn't used, so that nobody can repeat the draw": lambda width, m, generator: _start()(
        width, m, None
    ),
}


def _made(
    formula: Callable[..., Tensor] = bottleneck, begin: Callable[..., Any] = start, *, trains: bool = True
) -> type[nn.Module]:
    """The class with another formula or another start."""

    class Wrong(nn.Module):
        def __init__(self, width: int, m: int, scaling: float, generator: torch.Generator) -> None:
            super().__init__()
            self.scaling = scaling
            names, drawn = ("down", "down_bias", "up", "up_bias"), begin(width, m, generator)
            for name, value in zip(names, drawn, strict=True):
                setattr(self, name, nn.Parameter(value) if trains else value)

        def forward(self, h: Tensor) -> Tensor:
            return formula(h, self.down, self.down_bias, self.up, self.up_bias, self.scaling)

    return Wrong


BOTTLENECK_MISTAKES: dict[str, Callable[..., Any]] = {
    **{name: _made(begin=wrong) for name, wrong in START_MISTAKES.items()},
    **{name: _made(wrong) for name, wrong in FORMULA_MISTAKES.items()},
    "down, down_bias, up and up_bias must be an nn.Parameter each: nothing here would train": _made(
        trains=False
    ),
}

SUBLAYER_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "what the sublayer gives is lost: the adapter's output is added to f(x)": (
        lambda f, x, adapter, placement: adapter(f(x) if placement == "serial" else x)
    ),
    "x is added, too: the block around the sublayer does that": (
        lambda f, x, adapter, placement: x + adapted_sublayer(f, x, adapter, placement)
    ),
    "the adapter reads f(x) in both places; beside the sublayer it reads x": (
        lambda f, x, adapter, placement: adapted_sublayer(f, x, adapter, "serial")
    ),
    "the adapter reads x in both places; after the sublayer it reads f(x)": (
        lambda f, x, adapter, placement: adapted_sublayer(f, x, adapter, "parallel")
    ),
    "the two places are exchanged": lambda f, x, adapter, placement: adapted_sublayer(
        f, x, adapter, "parallel" if placement == "serial" else "serial"
    ),
    "the adapter stands before the sublayer": lambda f, x, adapter, placement: f(x + adapter(x)),
    "the adapter's output replaces its input: f(x) is missing in the sum": (
        lambda f, x, adapter, placement: x + adapter(f(x))
    ),
    "the adapter reads f(x) + x; that is another place (see below), here it is f(x)": (
        lambda f, x, adapter, placement: (h := f(x)) + adapter(h + x if placement == "serial" else x)
    ),
    "the adapter is subtracted": lambda f, x, adapter, placement: (
        2 * (h := f(x)) - (h + adapter(h if placement == "serial" else x))
    ),
    "the sublayer is called twice: keep what it gave": (
        lambda f, x, adapter, placement: f(x) + adapter(f(x) if placement == "serial" else x)
    ),
    "no gradient flows through the adapter to what it reads": (
        lambda f, x, adapter, placement: (h := f(x)) + adapter((h if placement == "serial" else x).detach())
    ),
    "no gradient flows through the frozen sublayer; frozen weights still pass it on": (
        lambda f, x, adapter, placement: (h := f(x).detach()) + adapter(h if placement == "serial" else x)
    ),
}
