"""Recompute cheap activations from what the graph keeps anyway, instead of keeping them too.

In a gated feed-forward layer, silu(g) · u, autograd keeps g (for silu), u and silu(g) (for the product), although
the last is one element-wise pass over the first. So it is with a normalised input w · (h · ρ) with frozen w, next
to h and ρ. Here such a tensor is dropped and made again, bit for bit, when the backward pass asks for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["recompute_activations"]


def recompute_activations() -> Any:
    """A context for the forward pass: keep no silu, GELU or product that can be made again from what is kept.

    Works on any model, without touching it: each tensor that autograd is about to keep knows the operation that
    made it, and that operation keeps its own operands. These are released only after every user of the result
    has run backward, so they are always there. Gradients are the same numbers.

    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> with recompute_activations():
    ...     y = (x * x) * x                                             # x · x isn't kept
    >>> y.backward(); x.grad                                            # 3 x²
    tensor(12.)

    Cost: one or two element-wise passes for each tensor dropped; never a matrix product.
    """
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


def _pack(tensor: Tensor) -> Any:
    return tensor.grad_fn if _can_be_made_again(tensor.grad_fn) else tensor


def _unpack(packed: Any) -> Tensor:
    return packed if isinstance(packed, Tensor) else _make_again(packed)


def _can_be_made_again(node: Any) -> bool:
    """Whether the operation keeps its operands, or all but one, which can be made again in the same way."""
    name = type(node).__name__
    if name != "MulBackward0":
        return name in ("SiluBackward0", "GeluBackward0")
    # A product keeps an operand only for the gradient of the other one.
    left, right = (operand for operand, _ in node.next_functions)
    return (left is not None and right is not None) or _can_be_made_again(left or right)


def _make_again(node: Any) -> Tensor:
    with torch.no_grad():
        name = type(node).__name__
        if name == "SiluBackward0":
            return F.silu(node._saved_self)
        if name == "GeluBackward0":
            return F.gelu(node._saved_self, approximate=node._saved_approximate)
        operands = []
        for kept, (operand, _) in zip(
            (node._saved_self, node._saved_other), node.next_functions, strict=True
        ):
            operands.append(_make_again(operand) if kept is None else kept)
        return operands[0] * operands[1]
