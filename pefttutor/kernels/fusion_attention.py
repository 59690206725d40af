"""Attention of each token over what N adapters say of it, associated so that no key and no value is ever made.

    y = Σₙ sₙ V zₙ,   s = softmaxₙ((Q h + b) · (K zₙ))

(Q h + b) · (K zₙ) is (Kᵀ (Q h + b)) · zₙ, and Σₙ sₙ V zₙ is V Σₙ sₙ zₙ: one product with K and one with V a token
instead of N each. Both derivatives follow the same way, since autograd goes it backwards.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["fusion_attention", "fusion_attention_reference"]


def fusion_attention_reference(
    h: Tensor, z: Tensor, query: Tensor, query_bias: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """The formula as it stands. Shapes: those of `fusion_attention`."""
    asked, keys, values = F.linear(h, query, query_bias), F.linear(z, key), F.linear(z, value)
    s = (asked.unsqueeze(-2) * keys).sum(-1).softmax(-1)  # (…, N)
    return (s.unsqueeze(-1) * values).sum(-2)


def fusion_attention(
    h: Tensor, z: Tensor, query: Tensor, query_bias: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """y = V Σₙ sₙ zₙ with s = softmaxₙ(Kᵀ(Q h + b) · zₙ); the softmax is taken in float32 at least.

    >>> h, z = torch.ones(1, 2), torch.tensor([[[1.0, 0.0], [0.0, 3.0]]])       # one token, two adapters
    >>> fusion_attention(h, z, torch.zeros(2, 2), torch.zeros(2), torch.eye(2), torch.eye(2))  # nothing asked: a mean
    tensor([[0.5000, 1.5000]])

    Shapes: h (…, d), z (…, N, d), query, key, value (d, d), query_bias (d) → (…, d).
    Cost: 6·d² + 4·N·d FLOPs a token forward, where the formula as it stands takes (2 + 4·N)·d²; it keeps one tensor
        (…, d) for each product instead of N.
    Source: Pfeiffer et al. 2021, arXiv:2005.00247, eq. 4.
    """
    asked = F.linear(F.linear(h, query, query_bias), key.t())  # (…, d)
    scores = (z @ asked.unsqueeze(-1)).squeeze(-1)  # (…, N)
    s = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return F.linear((s.to(z.dtype).unsqueeze(-2) @ z).squeeze(-2), value)
