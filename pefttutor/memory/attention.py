"""What attention keeps: with `eager` the whole matrix of probabilities, with a fused kernel only its inputs and output.

eager   q, k, v copied head by head, softmax(q kᵀ): batch · heads · length² numbers, once more with dropout
fused   q, k, v, the output, and one number a row (its log-sum-exp)
masked  sdpa where padding or a sliding window needs a mask: batch · length² numbers of it, and k, v once for every head
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pefttutor.memory.paper import FLOAT, Paper
from pefttutor.memory.tape import Tape

__all__ = ["ATTENTION", "Attention", "window"]

ATTENTION = ("eager", "sdpa", "flash_attention_2")


def window(config: Any, layer: int) -> int | None:
    """How many tokens back a layer of a decoder sees, the token itself included; None for all of them.

    >>> from types import SimpleNamespace
    >>> window(SimpleNamespace(sliding_window=128), layer=0), window(SimpleNamespace(), layer=0)
    (128, None)
    """
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or kinds[layer] == "sliding_attention"
    return getattr(config, "sliding_window", None) if slides else None


@dataclass(frozen=True)
class Attention:
    """softmax(q kᵀ / √d) v of every head.

    >>> for mode in ("eager", "sdpa"):
    ...     tape, qkv = Tape(), [Paper(rows=64, width=16, itemsize=2, grad=True) for _ in range(3)]
    ...     _ = Attention(batch=1, heads=4, kv_heads=4, length=64, keys=64, mode=mode)(tape, *qkv)
    ...     print(mode, tape.bytes_by_kind()["attention"])          # with and without 4 · 64² probabilities
    eager 38912
    sdpa 9216

    bias: of T5's positions; None where there is none, else whether it trains. masked: whether `sdpa` gets a mask.
    before: how many of the keys are a prefix. before_trains: whether it does.
    float_softmax: whether the model takes the softmax in float32 and rounds it back, which keeps both.
    """

    batch: int
    heads: int
    kv_heads: int
    length: int
    keys: int
    mode: str
    dropout: float = 0.0
    float_softmax: bool = False
    bias: bool | None = None
    masked: bool = False
    before: int = 0
    before_trains: bool = False

    def __call__(self, tape: Tape, q: Paper, k: Paper, v: Paper) -> Paper:
        """q (batch · length, heads · d), k and v (batch · keys, kv_heads · d) → (batch · length, heads · d)."""
        if self.before:
            rows = k.rows + self.batch * self.before
            k, v = (x.like(rows=rows, grad=x.grad or self.before_trains) for x in (k, v))
        if self.mode == "eager":
            return self._written_out(tape, q, k, v)
        if tape.device == "cpu" and (self.dropout or self.bias):  # which the fused kernel there doesn't know
            return tape.cast(self._written_out(tape, q, k, v), q.itemsize)
        masked = self.masked and self.mode == "sdpa"
        if masked and self.heads > self.kv_heads:  # its kernels can't share k and v between heads then
            k, v = (x.like(width=q.width) for x in (k, v))
        out = q.like(k, v)
        if out.grad:
            for tensor in (q, k, v, out):
                tape.save(tensor, "attention")
            tape.save(q.like(width=self.heads, itemsize=FLOAT), "attention")  # log-sum-exp
            if masked or self.bias is not None:
                rows = (self.batch if masked else 1) * (1 if self.bias is None else self.heads) * self.length
                tape.save(Paper(rows, self.keys, q.itemsize, False), "attention")
        return out

    def _written_out(self, tape: Tape, q: Paper, k: Paper, v: Paper) -> Paper:
        repeated, fused = self.heads // self.kv_heads, self.mode != "eager"
        # A fused kernel's fallback computes in float32.
        width = max(q.itemsize, FLOAT) if fused else q.itemsize
        q, k, v = (tape.cast(x, width) for x in (q, k, v))
        q = q.like()  # the product copies each head's part to one place
        k, v = (x.like(width=x.width * repeated) for x in (k, v))
        scores = tape.mul(q, k, "attention").like(rows=self.batch * self.heads * self.length, width=self.keys)
        scores = scores.like(grad=scores.grad or bool(self.bias))
        wide = scores.like(itemsize=FLOAT if self.float_softmax and not fused else width)
        if wide.grad:
            tape.save(wide, "attention")
        weights = tape.dropout(tape.cast(wide, width), self.dropout)
        weights = weights.like() if self.dropout else weights
        tape.mul(weights, v, "attention")  # keeps the weights for v, and v for the weights
        return q.like(k, v, grad=weights.grad or v.grad)
