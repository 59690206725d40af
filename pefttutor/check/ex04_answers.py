"""Notebook 04, attention: the right answers, and those that learners write instead, each with its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# ---- the reference solutions


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, mask: Tensor
) -> Tensor:
    """softmax(q [P_K; K]ᵀ / √d_h) [P_V; V]; words see the prefix, and of the text what isn't later or padding.

    q, k, v (batch, heads, n, d_h), prefix_k, prefix_v (heads, P, d_h), mask (batch, n) → (batch, heads, n, d_h)
    """
    batch, count, n = len(q), prefix_k.shape[1], q.shape[2]
    keys = torch.cat([prefix_k.expand(batch, -1, -1, -1), k], 2)
    values = torch.cat([prefix_v.expand(batch, -1, -1, -1), v], 2)
    text = torch.ones(n, n, dtype=torch.bool).tril() & mask.bool()[:, None, None]  # (batch, 1, n, n)
    seen = torch.cat([text.new_ones(batch, 1, n, count), text], 3)
    scores = (q @ keys.mT / q.shape[3] ** 0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(3) @ values


def prefix_share(prefix_scores: Tensor, text_scores: Tensor) -> Tensor:
    """λ = Σ exp(prefix) / (Σ exp(prefix) + Σ exp(text)), for scores of any size.   (…, P), (…, n) → (…)."""
    return torch.sigmoid(prefix_scores.logsumexp(-1) - text_scores.logsumexp(-1))


# ---- what learners write instead


def _attention(
    *,
    order: int = 1,
    causal: Callable[[Tensor, int], Tensor] = lambda text, count: torch.cat(
        [text.new_ones(*text.shape[:3], count), text], 3
    ),
    past: bool = True,
    padding: bool = True,
    scale: Callable[[int], float] = lambda width: width**0.5,
    dim: int = 3,
    parts: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda key, value: (key, value),
    end: Callable[[Tensor, int, Tensor], Tensor] = lambda scores, count, values: scores @ values,
) -> Callable[..., Tensor]:
    """order −1: the prefix stands behind. causal: who is seen, given who of the text is. end: from shares to values."""

    def wrong_attention(
        q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, mask: Tensor
    ) -> Tensor:
        batch, (_, count, width), n = len(q), prefix_k.shape, q.shape[2]
        own = [rows.expand(batch, -1, -1, -1) for rows in parts(prefix_k, prefix_v)]
        keys, values = (torch.cat([a, b][::order], 2) for a, b in zip(own, (k, v), strict=True))
        text = torch.ones(n, n, dtype=torch.bool)
        text = (text.tril() if past else text) & (mask.bool() | (not padding))[:, None, None]
        scores = (q @ keys.mT / scale(width)).masked_fill(~causal(text, count), -torch.inf)
        return end(scores.softmax(dim), count, values)

    return wrong_attention


def _lower_left(text: Tensor, count: int) -> Tensor:
    """Query i sees the first i + 1 of all keys, as if the prefix were the text's beginning."""
    n = text.shape[2]
    real = torch.cat([text.new_ones(len(text), 1, 1, count), text[:, :, -1:]], 3)
    return torch.ones(n, n + count, dtype=torch.bool).tril() & real


def _apart(shares: Tensor, count: int, values: Tensor) -> Tensor:
    """Each part with a softmax of its own."""
    own, text = shares[..., :count], shares[..., count:]
    both = [part / part.sum(3, keepdim=True).clamp(min=1e-20) for part in (own, text)]
    return torch.cat(both, 3) @ values


ATTENTION_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "the mask slides over the prefix: the first word sees one row of it, and not itself": _attention(
        causal=_lower_left
    ),
    "the prefix stands behind the text, and the mask still has it first": _attention(order=-1),
    "padding is seen: the mask belongs to the text's keys": _attention(padding=False),
    "later words are seen: in the text, word i sees words up to i": _attention(past=False),
    "nobody sees the prefix": _attention(
        causal=lambda text, count: torch.cat([text.new_zeros(*text.shape[:3], count), text], 3)
    ),
    "only the last word sees the prefix": _attention(
        causal=lambda text, count: torch.cat(
            [
                (torch.arange(text.shape[2]) == text.shape[2] - 1)[None, None, :, None].expand(
                    len(text), 1, -1, count
                ),
                text,
            ],
            3,
        )
    ),
    "the scores aren't divided by √d_h": _attention(scale=lambda width: 1.0),
    "the scores are divided by d_h, not by its root": _attention(scale=lambda width: float(width)),
    "the softmax runs over the queries; it runs over the keys, the last dimension": _attention(dim=2),
    "keys and values of the prefix are exchanged": _attention(parts=lambda key, value: (value, key)),
    "the prefix's keys stand where its values belong": _attention(parts=lambda key, value: (key, key)),
    "prefix and text have a softmax each, and are summed: together they have one": _attention(end=_apart),
    "the prefix takes its share and says nothing: its values are missing": _attention(
        end=lambda shares, count, values: shares[..., count:] @ values[:, :, count:]
    ),
    "no gradient reaches the prefix: it is detached": _attention(
        parts=lambda key, value: (key.detach(), value.detach())
    ),
}


def _sum(scores: Tensor) -> Tensor:
    return scores.logsumexp(-1)


SHARE_MISTAKES: dict[str, Callable[..., Any]] = {
    "this is the text's share, 1 − λ": lambda prefix_scores, text_scores: torch.sigmoid(
        _sum(text_scores) - _sum(prefix_scores)
    ),
    "exp of a large score is infinite: take the difference of two logsumexp": (
        lambda prefix_scores, text_scores: (
            (own := prefix_scores.exp().sum(-1)) / (own + text_scores.exp().sum(-1))
        )
    ),
    "prefix is held against text, not against both together": lambda prefix_scores, text_scores: torch.exp(
        _sum(prefix_scores) - _sum(text_scores)
    ),
    "scores are summed before exp: exp comes first, for each key": (
        lambda prefix_scores, text_scores: torch.sigmoid(
            prefix_scores.sum(-1) - text_scores.nan_to_num(neginf=0.0).sum(-1)
        )
    ),
    "exp is missing: a score isn't a share": lambda prefix_scores, text_scores: (
        (own := prefix_scores.sum(-1)) / (own + text_scores.nan_to_num(neginf=0.0).sum(-1))
    ),
    "the means of both parts are compared; more keys have more to say, so sums are": (
        lambda prefix_scores, text_scores: torch.sigmoid(
            _sum(prefix_scores)
            - _sum(text_scores)
            - torch.tensor(prefix_scores.shape[-1] / text_scores.shape[-1]).log()
        )
    ),
    "the largest scores stand for all": lambda prefix_scores, text_scores: torch.sigmoid(
        prefix_scores.amax(-1) - text_scores.amax(-1)
    ),
    "each row of the prefix has a share here; λ is their sum": lambda prefix_scores, text_scores: torch.cat(
        [prefix_scores, text_scores], -1
    ).softmax(-1)[..., : prefix_scores.shape[-1]],
    "this is the mean of the rows' shares; λ is their sum": lambda prefix_scores, text_scores: (
        torch.cat([prefix_scores, text_scores], -1).softmax(-1)[..., : prefix_scores.shape[-1]].mean(-1)
    ),
    "a softmax over the prefix alone adds up to 1 whatever the text says": (
        lambda prefix_scores, text_scores: prefix_scores.softmax(-1).sum(-1)
    ),
    "the shares of keys are counted, P / (P + n); scores decide": (
        lambda prefix_scores, text_scores: torch.full(
            prefix_scores.shape[:-1],
            prefix_scores.shape[-1] / (prefix_scores.shape[-1] + text_scores.shape[-1]),
        )
    ),
    "one number for all queries: each has a share of its own": lambda prefix_scores, text_scores: (
        prefix_share(prefix_scores, text_scores).mean()
    ),
    "a key that isn't seen counts as one of score 0: exp(−inf) is 0": lambda prefix_scores, text_scores: (
        prefix_share(prefix_scores, text_scores.nan_to_num(neginf=0.0))
    ),
}
