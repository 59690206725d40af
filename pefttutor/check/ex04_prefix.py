"""Notebook 04, the prefix itself: the right answers, and those that learners write instead, each with its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Pairs = list[tuple[Tensor, Tensor]]

# ---- the reference solutions


def layer_pairs(prefix: Tensor, layers: int, heads: int, batch: int) -> Pairs:
    """Of each layer its key and its value.   (P, 2 · layers · heads · d_h) → each (batch, heads, P, d_h)."""
    each = prefix.view(len(prefix), layers, 2, heads, -1).permute(1, 2, 3, 0, 4)
    return [(key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)) for key, value in each]


class MadeByMLP(nn.Module):
    """W₂ tanh(W₁ t + b₁) + b₂ of each row t of a table.   (count, d) → (count, width)."""

    def __init__(self, count: int, d: int, m: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(count, d))
        self.first, self.second = nn.Linear(d, m), nn.Linear(m, width)

    def forward(self) -> Tensor:
        return self.second(torch.tanh(self.first(self.table)))

    def dropped(self) -> nn.Parameter:
        """What it makes at the moment, as values that train themselves."""
        return nn.Parameter(self().detach())


# ---- what learners write instead


def _pairs(
    *,
    view: Callable[[Tensor, int, int], Tensor] = lambda prefix, layers, heads: prefix.view(
        len(prefix), layers, 2, heads, -1
    ).permute(1, 2, 3, 0, 4),
    each: Callable[[Tensor, int], Tensor] = lambda rows, batch: rows.expand(batch, -1, -1, -1),
    end: Callable[[Pairs], Any] = lambda pairs: pairs,
) -> Callable[..., Any]:
    """view: (layers, 2, heads, P, d_h) of the table. each: one key or value for the batch."""

    def wrong_pairs(prefix: Tensor, layers: int, heads: int, batch: int) -> Any:
        return end([(each(key, batch), each(value, batch)) for key, value in view(prefix, layers, heads)])

    return wrong_pairs


PAIRS_MISTAKES: dict[str, Callable[..., Any]] = {
    "`view` alone mixes the virtual tokens: split each row first, then move P with permute": _pairs(
        view=lambda prefix, layers, heads: prefix.view(layers, 2, heads, len(prefix), -1)
    ),
    "all keys come first, then all values; here each layer has its key and its value": _pairs(
        view=lambda prefix, layers, heads: prefix.view(len(prefix), 2, layers, heads, -1).permute(
            2, 1, 3, 0, 4
        )
    ),
    "keys and values are exchanged": _pairs(end=lambda pairs: [(value, key) for key, value in pairs]),
    "the layers are in reverse": _pairs(end=lambda pairs: pairs[::-1]),
    "every layer has the first one's pair": _pairs(end=lambda pairs: pairs[:1] * len(pairs)),
    "a row is split into d_h heads of `heads` values; it is head by head": _pairs(
        view=lambda prefix, layers, heads: prefix.view(len(prefix), layers, 2, -1, heads).permute(
            1, 2, 4, 0, 3
        )
    ),
    "heads and virtual tokens are exchanged: (batch, heads, P, d_h) is what a cache holds": _pairs(
        each=lambda rows, batch: rows.transpose(0, 1).expand(batch, -1, -1, -1)
    ),
    "the batch is missing: each text has the same pair": _pairs(each=lambda rows, batch: rows),
    "there is one text only, whatever the batch": _pairs(each=lambda rows, batch: rows[None]),
    "the virtual tokens are in reverse": _pairs(
        each=lambda rows, batch: rows.flip(1).expand(batch, -1, -1, -1)
    ),
    "no gradient reaches the prefix: it is detached": _pairs(
        each=lambda rows, batch: rows.detach().expand(batch, -1, -1, -1)
    ),
}


def _made(
    *,
    act: Callable[[Tensor], Tensor] = torch.tanh,
    read: Callable[[Tensor], Tensor] = lambda table: table,
    end: Callable[[Tensor], Tensor] = lambda made: made,
    start: Callable[[Tensor], Any] = nn.Parameter,
    bias: bool = True,
    drop: Callable[[Any], Any] = lambda self: nn.Parameter(self().detach()),
) -> type[nn.Module]:
    class Wrong(nn.Module):
        def __init__(self, count: int, d: int, m: int, width: int) -> None:
            super().__init__()
            self.table = start(torch.randn(count, d))
            self.first, self.second = nn.Linear(d, m, bias=bias), nn.Linear(m, width, bias=bias)

        def forward(self) -> Tensor:
            return end(self.second(act(self.first(read(self.table)))))

        def dropped(self) -> Any:
            return drop(self)

    return Wrong


MLP_MISTAKES: dict[str, Callable[..., Any]] = {
    "the nonlinearity is missing: two linear layers are one": _made(act=lambda x: x),
    "the nonlinearity is relu; tanh is wanted": _made(act=torch.relu),
    "tanh stands at the end, so that no key or value gets beyond ±1; it stands in the middle": _made(
        act=lambda x: x, end=torch.tanh
    ),
    "another tanh stands at the end, so that no key or value gets beyond ±1": _made(end=torch.tanh),
    "all rows of the table are zero: then all rows of the prefix are alike, and stay alike": _made(
        start=lambda drawn: nn.Parameter(torch.zeros_like(drawn))
    ),
    "all rows of the table are alike: then all rows of the prefix are alike, and stay alike": _made(
        start=lambda drawn: nn.Parameter(drawn[:1].expand_as(drawn).clone())
    ),
    "the table is no nn.Parameter: it would not train": _made(start=lambda drawn: drawn),
    "the layers have no biases": _made(bias=False),
    "the table is detached: no gradient reaches it": _made(read=lambda table: table.detach()),
    "what is kept still hangs on the MLP by its graph": _made(drop=lambda self: self()),
    "what is kept doesn't train: it is no nn.Parameter": _made(drop=lambda self: self().detach()),
    "the table is kept; what the MLP makes of it is wanted": _made(
        drop=lambda self: nn.Parameter(self.table.detach().clone())
    ),
}
