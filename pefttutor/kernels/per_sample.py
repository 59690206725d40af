"""Each sample's own gradient of a layer's parameter, from what went into the layer and what came back to it.

A batch's gradient is a sum over samples. Before the sum there is, for input a (B, T, in) and gradient δ (B, T, out)
at the output y of

    y = a Wᵀ + b:     G_W[s] = δ[s]ᵀ a[s]           G_b[s] = Σ_t δ[s, t]
    y = a W + b:      G_W[s] = a[s]ᵀ δ[s]           (GPT-2's Conv1D stores W as (in, out))
    y = E[ids]:       G_E[s, v] = Σ_{t: ids[s, t] = v} δ[s, t]
    y = γ · x̂ + β:    G_γ[s] = Σ_t δ[s, t] · x̂[s, t]

which costs what the batch's own gradient costs. B gradients at once would be B times as large as the parameter, so
they are made one after the other, or a few at a time on a GPU, and of a large parameter some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from pefttutor.kernels import threads

__all__ = ["Use", "kind_of", "knows", "scaled_input", "squares", "vectors"]

Use = tuple[nn.Module, str, Tensor, Tensor]  # a layer, its parameter's name, a (B, T, in) and δ (B, T, out)


def kind_of(layer: nn.Module) -> str | None:
    """Which of the formulas is the layer's. Exact types, because a subclass may compute something else; by name
    for those that libraries define themselves.

    >>> [kind_of(layer) for layer in (nn.Linear(1, 1), nn.LayerNorm(1), nn.PReLU())]
    ['linear', 'norm', None]
    """
    name = type(layer).__name__
    if type(layer) is nn.Linear or name == "Conv1D":
        return "linear" if name == "Linear" else "conv1d"
    if type(layer) is nn.Embedding:
        plain = layer.max_norm is None and not layer.scale_grad_by_freq
        return "embedding" if plain else None
    if type(layer) is nn.LayerNorm or name.endswith("RMSNorm"):
        weight = getattr(layer, "weight", None)
        return "norm" if isinstance(weight, Tensor) and weight.dim() == 1 else None
    return None


def knows(layer: nn.Module) -> bool:
    """Whether this file has the formula of each of the layer's own parameters.

    >>> knows(nn.Linear(1, 1)), knows(nn.Embedding(1, 1, max_norm=1.0))
    (True, False)
    """
    return kind_of(layer) is not None and set(layer._parameters) <= {"weight", "bias"}


def vectors(layer: nn.Module, name: str, a: Tensor, delta: Tensor) -> Tensor:
    """All samples' gradients of a bias or of a norm's weight. Shapes: (B, T, in), (B, T, out) → (B, out).

    >>> delta = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])         # two samples of two tokens
    >>> vectors(nn.Linear(1, 1), "bias", torch.zeros(2, 2, 1), delta).tolist()
    [[3.0], [7.0]]
    """
    return delta.sum(1) if name == "bias" else (delta * scaled_input(layer, a)).sum(1)


def squares(uses: list[Use], into: Tensor, *, max_bytes: int) -> Iterator[Callable[[], None]]:
    """Pieces of work that add Σ_s G[s]² to `into`, where G[s] is the sum over all uses of one parameter (a tied
    weight has several). They may be done in any order and at once; each needs up to `max_bytes` for a gradient.

    >>> delta, total = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), torch.zeros(1)
    >>> for piece in squares([(nn.Linear(1, 1), "bias", torch.zeros(2, 2, 1), delta)], total, max_bytes=64): piece()
    >>> total                                                           # (1 + 2)² + (3 + 4)²
    tensor([58.])
    """
    if into.dim() == 1:
        yield partial(_add_vectors, uses, into)
    elif len(uses) == 1 and kind_of(uses[0][0]) == "embedding":
        yield partial(_add_occurring, *uses[0], into)
    else:
        row = into.shape[1] * uses[0][3].element_size()
        step = max(1, max_bytes // row)
        add = partial(_add_rows_of_several, max_bytes) if threads.short_way(into.device) else _add_rows
        for first in range(0, len(into), step):
            yield partial(add, uses, first, into[first : first + step])


def _add_vectors(uses: list[Use], into: Tensor) -> None:
    gradients = torch.stack([vectors(*use) for use in uses]).sum(0)  # (B, out)
    into += gradients.to(into.dtype).square_().sum(0)


def _add_occurring(layer: nn.Module, name: str, ids: Tensor, delta: Tensor, into: Tensor) -> None:
    """An embedding: only the rows that occur. A sample's equal ids get one place, in which their gradients add up."""
    samples, tokens = ids.shape
    ids = ids.long()
    ordered, order = ids.sort(1)
    rank = torch.zeros_like(ids)
    rank[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    place = torch.empty_like(ids).scatter_(1, order, rank)  # (B, T), from 0 on in each sample
    row = torch.zeros_like(ids).scatter_(1, place, ids)  # of the table, for each place
    summed = into.new_zeros(samples * tokens, into.shape[1])
    first = torch.arange(0, samples * tokens, max(1, tokens), device=ids.device).unsqueeze(1)
    counted = delta.masked_fill(~_counts(layer, ids).unsqueeze(2), 0)
    summed.index_add_(0, (place + first).flatten(), counted.flatten(0, 1).to(into.dtype))
    into.index_add_(0, row.flatten(), summed.square_())


def _add_rows(uses: list[Use], first: int, into: Tensor) -> None:
    """Rows first, first + 1, … of a weight, as many as `into` has."""
    factors = [_factors(layer, a, delta, first, first + len(into)) for layer, _, a, delta in uses]
    left, right = factors[0]
    if len(uses) == 1 and right.shape[1] == 1:  # one token a sample: G² is a product of two matrices as well
        into.addmm_(*(x.to(into.dtype).square() for x in (left[:, :, 0].t(), right[:, 0])))
        return
    dtypes = {part.dtype for _, part in factors}  # an embedding's and its head's differ under autocast
    if len(dtypes) > 1:
        factors = [
            (left if left.dim() == 2 else left.to(into.dtype), right.to(into.dtype))
            for left, right in factors
        ]
    gradient = factors[0][1].new_empty(into.shape)  # one for all samples: it stays in the cache
    for of_sample in zip(*(zip(*map(torch.unbind, pair), strict=True) for pair in factors), strict=True):
        for i, (left, right) in enumerate(of_sample):
            if left.dim() == 2:
                gradient.addmm_(left, right, beta=min(i, 1))
            else:
                (gradient if i else gradient.zero_()).index_add_(0, left[left >= 0], right[left >= 0])
        exact = gradient.to(into.dtype)
        into.addcmul_(exact, exact)


def _add_rows_of_several(max_bytes: int, uses: list[Use], first: int, into: Tensor) -> None:
    """`_add_rows` as it is short for a GPU: one order for as many samples as fit, and nothing is asked of it."""
    step = max(1, max_bytes // (into.numel() * into.element_size()))
    for start in range(0, len(uses[0][3]), step):
        some = slice(start, start + step)
        gradients = (_rows(layer, a[some], delta[some], first, into) for layer, _, a, delta in uses)
        gradient = reduce(Tensor.add_, gradients)  # (samples, rows, columns)
        norm = torch.linalg.vector_norm(gradient, dim=0)  # in one pass
        into.addcmul_(norm, norm)


def _rows(layer: nn.Module, a: Tensor, delta: Tensor, first: int, like: Tensor) -> Tensor:
    """Rows first, first + 1, … of each sample's gradient. Shapes: (B, T, in), (B, T, out) → (B, rows, columns)."""
    rows, columns = like.shape
    if kind_of(layer) != "embedding":
        left, right = _factors(layer, a, delta, first, first + rows)
        return (left @ right).to(like.dtype)
    place, _ = _factors(layer, a.long(), delta, first, first + rows)  # (B, T), −1 where not wanted
    room = like.new_zeros(len(a), rows + 1, columns)  # what isn't wanted goes before row 0
    room.scatter_add_(1, (place + 1).unsqueeze(2).expand(-1, -1, columns), delta.to(like.dtype))
    return room[:, 1:]


def _factors(layer: Any, a: Tensor, delta: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Of each sample's gradient, rows first … last − 1: it is left @ right, and for an embedding right summed by left.

    Shapes: (B, rows, T), (B, T, columns); for an embedding (B, T), (B, T, columns), where rows not wanted are −1.
    """
    kind = kind_of(layer)
    if kind == "embedding":
        wanted = (a >= first) & (a < last) & _counts(layer, a)
        return torch.where(wanted, a - first, -1), delta
    if not threads.short_way(a.device):
        a, delta = _busy(a, delta)
    if kind == "linear":
        return delta[:, :, first:last].mT, a
    return a[:, :, first:last].mT, delta


def _busy(a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that got a gradient, if those are few: of a classifier's last layer often one, of answers their own.

    Shapes: (B, T, in), (B, T, out) → the same with n tokens, n the largest number that a sample has.
    """
    tokens = delta.shape[1]
    if not tokens or 2 * int((delta[:, :, 0] == 0).sum(1).min()) < tokens:
        return a, delta  # seen at a glance
    got = delta.any(2)
    most = int(got.sum(1).max())
    if 2 * most > tokens:
        return a, delta
    place = got.byte().topk(max(1, most), 1).indices
    return tuple(x.take_along_dim(place.unsqueeze(2), 1) for x in (a, delta))  # type: ignore[return-value]


def _counts(layer: Any, ids: Tensor) -> Tensor:
    """Where an embedding's row gets a gradient: not at its padding index."""
    return torch.ones_like(ids, dtype=torch.bool) if layer.padding_idx is None else ids != layer.padding_idx


def scaled_input(layer: nn.Module, x: Tensor) -> Tensor:
    """x̂ of a norm y = γ · x̂ + β (or (1 + γ) · x̂): what γ multiplies, whatever the layer does to get it.

    >>> scaled_input(nn.LayerNorm(2, eps=0.0), torch.tensor([2.0, 6.0]))    # mean 4, deviation 2
    tensor([-1.,  1.])
    """
    if type(layer) is nn.LayerNorm:
        return layer_norm(x, layer.normalized_shape, eps=layer.eps)
    zero = {name: torch.zeros_like(p) for name, p in layer.named_parameters(recurse=False)}
    one = zero | {"weight": torch.ones_like(zero["weight"])}
    forward = type(layer).forward
    with torch.no_grad():
        at_one, at_zero = (_with(layer, values, forward, x) for values in (one, zero))
    return at_one - at_zero


def _with(layer: nn.Module, values: dict[str, Tensor], forward: Any, x: Tensor) -> Tensor:
    """The layer's forward with other parameters, without its hooks."""
    try:
        vars(layer).update(values)  # found before the registered parameters
        return forward(layer, x)
    finally:
        for name in values:
            vars(layer).pop(name)
