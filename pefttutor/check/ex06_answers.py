"""Notebook 06, fusion of adapters: the right answers, and those that learners write instead, each with its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]
Start = tuple[Tensor, Tensor, Tensor, Tensor]

# ---- the reference solutions


def shares(h: Tensor, z: Tensor, query: Tensor, query_bias: Tensor, key: Tensor) -> Tensor:
    """s = softmaxₙ((Q h + b) · K zₙ).   h (…, d), z (…, N, d), query and key (d, d), query_bias (d) → (…, N)."""
    return scores(h, z, query, query_bias, key).softmax(-1)


def scores(h: Tensor, z: Tensor, query: Tensor, query_bias: Tensor, key: Tensor) -> Tensor:
    """(Q h + b) · K zₙ.   → (…, N)."""
    asked = (h @ query.T + query_bias).unsqueeze(-2)  # (…, 1, d)
    return (asked * (z @ key.T)).sum(-1)


def fused_sublayer(
    h: Tensor, adapters: Sequence[Map], choose: Callable[[Tensor, Tensor], Tensor], value: Tensor
) -> Tensor:
    """h + V Σₙ sₙ zₙ with zₙ = Aₙ(h) and s = choose(h, z).   h (…, d), value (d, d) → (…, d)."""
    z = torch.stack([adapter(h) for adapter in adapters], -2)  # (…, N, d)
    return h + (choose(h, z).unsqueeze(-1) * z).sum(-2) @ value.T


def fusion_start(width: int, generator: torch.Generator) -> Start:
    """Q and K from N(0, 0.02²), b = 0, V = I.   → Q (d, d), b (d), K (d, d), V (d, d)."""
    query, key = (0.02 * torch.randn(width, width, generator=generator) for _ in range(2))
    return query, torch.zeros(width), key, torch.eye(width)


def penalty(values: Sequence[Tensor], weight: float) -> Tensor:
    """weight · Σ (V − I)², over all entries of all layers.   values: each (d, d) → a number."""
    return weight * torch.stack([((value - torch.eye(len(value))) ** 2).sum() for value in values]).sum()


# ---- what learners write instead

SHARES_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "the scores are divided by √d; here they aren't": (
        lambda h, z, query, query_bias, key: (
            scores(h, z, query, query_bias, key) / h.shape[-1] ** 0.5
        ).softmax(-1)
    ),
    "the softmax runs over the tokens; it runs over the adapters": (
        lambda h, z, query, query_bias, key: scores(h, z, query, query_bias, key).softmax(-2)
    ),
    "these are the scores; the softmax over the adapters is missing": scores,
    "each score has a sigmoid of its own, so that the shares don't add up to 1": (
        lambda h, z, query, query_bias, key: scores(h, z, query, query_bias, key).sigmoid()
    ),
    "the largest score takes all; the softmax shares": lambda h, z, query, query_bias, key: (
        torch.nn.functional.one_hot(scores(h, z, query, query_bias, key).argmax(-1), z.shape[-2]).to(h)
    ),
    "Q is transposed: as in a linear layer it is h @ Q.T": (
        lambda h, z, query, query_bias, key: shares(h, z, query.T, query_bias, key)
    ),
    "K is transposed: as in a linear layer it is z @ K.T": (
        lambda h, z, query, query_bias, key: shares(h, z, query, query_bias, key.T)
    ),
    "b is forgotten, or added to all keys, where the softmax doesn't see it; it belongs to Q h": (
        lambda h, z, query, query_bias, key: shares(h, z, query, 0 * query_bias, key)
    ),
    "K is forgotten: the question meets zₙ itself": lambda h, z, query, query_bias, key: (
        ((h @ query.T + query_bias).unsqueeze(-2) * z).sum(-1).softmax(-1)
    ),
    "Q is forgotten: h itself asks": lambda h, z, query, query_bias, key: (
        ((h + query_bias).unsqueeze(-2) * (z @ key.T)).sum(-1).softmax(-1)
    ),
    "Q and K have changed places: Q reads h, and K reads z": (
        lambda h, z, query, query_bias, key: shares(h, z, key, query_bias, query)
    ),
    "the products are averaged over the features; a dot product sums them": (
        lambda h, z, query, query_bias, key: (scores(h, z, query, query_bias, key) / h.shape[-1]).softmax(-1)
    ),
    "no gradient reaches h: it is detached": (
        lambda h, z, query, query_bias, key: shares(h.detach(), z, query, query_bias, key)
    ),
}


def _with_residual(adapter: Map) -> Map:
    return lambda x: x + adapter(x)


def _in_a_row(
    h: Tensor, adapters: Sequence[Map], choose: Callable[[Tensor, Tensor], Tensor], value: Tensor
) -> Tensor:
    found, stream = [], h
    for adapter in adapters:
        found.append(adapter(stream))
        stream = stream + found[-1]
    z = torch.stack(found, -2)
    return h + (choose(h, z).unsqueeze(-1) * z).sum(-2) @ value.T


def _called_again(
    h: Tensor, adapters: Sequence[Map], choose: Callable[[Tensor, Tensor], Tensor], value: Tensor
) -> Tensor:
    s = choose(h, torch.stack([adapter(h) for adapter in adapters], -2))
    return h + sum(s[..., n, None] * (adapter(h) @ value.T) for n, adapter in enumerate(adapters))


SUBLAYER_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "h is missing: the fusion's word is added to what the sublayer gives": (
        lambda h, adapters, choose, value: fused_sublayer(h, adapters, choose, value) - h
    ),
    "h is added to each zₙ, too: zₙ is what the adapter adds, without h": (
        lambda h, adapters, choose, value: fused_sublayer(
            h, [_with_residual(adapter) for adapter in adapters], choose, value
        )
    ),
    "h goes through V as well; it stays as it is": lambda h, adapters, choose, value: (
        h @ value.T + fused_sublayer(h, adapters, choose, value) - h
    ),
    "V is forgotten": lambda h, adapters, choose, value: fused_sublayer(
        h, adapters, choose, torch.eye(len(value))
    ),
    "V is transposed: as in a linear layer it is z @ V.T": (
        lambda h, adapters, choose, value: fused_sublayer(h, adapters, choose, value.T)
    ),
    "all adapters count the same: the shares aren't used": lambda h, adapters, choose, value: fused_sublayer(
        h, adapters, lambda h, z: torch.full(z.shape[:-1], 1 / len(adapters)), value
    ),
    "the words are summed whole, without the shares": lambda h, adapters, choose, value: fused_sublayer(
        h, adapters, lambda h, z: torch.ones(z.shape[:-1]), value
    ),
    "the adapters stand in a row, each on the one before; all of them read h": _in_a_row,
    "each adapter is called twice: keep what it gave": _called_again,
    "the shares are in the wrong order": lambda h, adapters, choose, value: fused_sublayer(
        h, adapters, lambda h, z: choose(h, z).flip(-1), value
    ),
    "choose is asked about h + zₙ; it wants what each adapter adds": (
        lambda h, adapters, choose, value: fused_sublayer(
            h, adapters, lambda h, z: choose(h, z + h.unsqueeze(-2)), value
        )
    ),
    "the adapter with the largest share alone speaks; each speaks by its share": (
        lambda h, adapters, choose, value: fused_sublayer(
            h, adapters, lambda h, z: (s := choose(h, z)) * (s == s.amax(-1, keepdim=True)), value
        )
    ),
    "what the fusion adds is subtracted": (
        lambda h, adapters, choose, value: 2 * h - fused_sublayer(h, adapters, choose, value)
    ),
}


def _start(
    *,
    query: Callable[[Tensor], Tensor] = lambda normal: 0.02 * normal,
    key: Callable[[Tensor], Tensor] = lambda normal: 0.02 * normal,
    value: Callable[[Tensor], Tensor] = lambda normal: torch.eye(len(normal)),
    bias: float = 0.0,
) -> Callable[..., Start]:
    def wrong_start(width: int, generator: torch.Generator | None) -> Start:
        normal = [torch.randn(width, width, generator=generator) for _ in range(3)]
        return query(normal[0]), torch.full((width,), bias), key(normal[1]), value(normal[2])

    return wrong_start


def _same_draw(width: int, generator: torch.Generator) -> Start:
    query, bias, _, value = fusion_start(width, generator)
    return query, bias, query.clone(), value


START_MISTAKES: dict[str, Callable[..., Start]] = {
    "V is zero: then no adapter is heard, and Q and K get no gradient": _start(value=torch.zeros_like),
    "V is random: then no adapter's word keeps its meaning; it starts at the identity": _start(
        value=lambda normal: 0.02 * normal
    ),
    "V is full of ones; the identity has them on its diagonal": _start(value=torch.ones_like),
    "V is nearly the identity; it is exactly that": _start(
        value=lambda normal: torch.eye(len(normal)) + 1e-3 * normal
    ),
    "Q and K are both zero: then neither ever gets a gradient": _start(
        query=torch.zeros_like, key=torch.zeros_like
    ),
    "Q is zero": _start(query=torch.zeros_like),
    "Q and K are the identity; only V is": _start(
        query=lambda normal: torch.eye(len(normal)), key=lambda normal: torch.eye(len(normal))
    ),
    "Q and K have the standard deviation 1; 0.02 is wanted": _start(
        query=lambda normal: normal, key=lambda normal: normal
    ),
    "Q and K have the standard deviation 1/√d; 0.02 is wanted": _start(
        query=lambda normal: normal / len(normal) ** 0.5, key=lambda normal: normal / len(normal) ** 0.5
    ),
    "the standard deviation is 0.02² = 0.0004: 0.02² is the variance": _start(
        query=lambda normal: 0.0004 * normal, key=lambda normal: 0.0004 * normal
    ),
    "Q and K are the same numbers; draw twice": _same_draw,
    "b isn't zero": _start(bias=0.02),
    "the generator isn't used, so that nobody can repeat the draw": lambda width, generator: _start()(
        width, None
    ),
}

PENALTY_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "V is pulled to zero; it is pulled to the identity": lambda values, weight: (
        weight * torch.stack([(value**2).sum() for value in values]).sum()
    ),
    "the squares are averaged in each layer; they are summed": lambda values, weight: (
        weight * torch.stack([((value - torch.eye(len(value))) ** 2).mean() for value in values]).sum()
    ),
    "the layers are averaged; they are summed": lambda values, weight: penalty(values, weight) / len(values),
    "a root is taken: the norm isn't squared": lambda values, weight: (
        weight * torch.stack([(value - torch.eye(len(value))).norm() for value in values]).sum()
    ),
    "the differences aren't squared but made positive": lambda values, weight: (
        weight * torch.stack([(value - torch.eye(len(value))).abs().sum() for value in values]).sum()
    ),
    "only the diagonal counts": lambda values, weight: (
        weight * torch.stack([((value.diagonal() - 1) ** 2).sum() for value in values]).sum()
    ),
    "ones are taken away everywhere; the identity has them on its diagonal": lambda values, weight: (
        weight * torch.stack([((value - 1) ** 2).sum() for value in values]).sum()
    ),
    "the weight is forgotten": lambda values, weight: penalty(values, 1.0),
    "the weight is squared, too": lambda values, weight: penalty(values, weight**2),
    "only the last layer counts": lambda values, weight: penalty(values[-1:], weight),
    "V Vᵀ is compared with the identity: any rotation would be free": lambda values, weight: penalty(
        [value @ value.T for value in values], weight
    ),
    "the sign is wrong: this rewards the distance": lambda values, weight: -penalty(values, weight),
    "no gradient reaches V: it is detached": lambda values, weight: penalty(
        [value.detach() for value in values], weight
    ),
}
