"""What attention keeps: with `eager` the whole matrix of probabilities, with a fused kernel only its inputs and output.

eager   q, k, v copied head by head, softmax(q kᵀ): batch · heads · length² numbers, once more with dropout
fused   q, k, v, the output, and one number a row (its log-sum-exp)
"""

from __future__ import annotations

from dataclasses import dataclass

from pefttutor.memory.paper import FLOAT, Paper
from pefttutor.memory.tape import Tape

__all__ = ["ATTENTION", "Attention"]

ATTENTION = ("eager", "sdpa", "flash_attention_2")


@dataclass(frozen=True)
class Attention:
    """softmax(q kᵀ / √d) v of every head.

    bias: T5's position bias: None where there is none, else whether it trains.
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

    def __call__(self, tape: Tape, q: Paper, k: Paper, v: Paper) -> Paper:
        """q (batch · length, heads · d), k and v (batch · keys, kv_heads · d) → (batch · length, heads · d)."""
        if self.mode == "eager":
            return self._written_out(tape, q, k, v)
        if tape.device == "cpu" and (self.dropout or self.bias):  # which the fused kernel there doesn't know
            return tape.cast(self._written_out(tape, q, k, v), q.itemsize)
        out = q.like(k, v)
        if out.grad:
            for kept in (q, k, v, out):
                tape.save(kept, "attention")
            tape.save(q.like(width=self.heads, itemsize=FLOAT), "attention")  # log-sum-exp
            if self.bias is not None:
                tape.save(Paper(self.heads * self.length, self.keys, q.itemsize, False), "attention")
        return out

    def _written_out(self, tape: Tape, q: Paper, k: Paper, v: Paper) -> Paper:
        repeated, fused = self.heads // self.kv_heads, self.mode != "eager"
        width = (
            max(q.itemsize, FLOAT) if fused else q.itemsize
        )  # a fused kernel's fallback computes in float32
        q, k, v = (tape.cast(x, width) for x in (q, k, v))
        q = q.like()  # the product copies each head's part to one place
        k, v = (x.like(width=x.width * repeated) for x in (k, v))
        scores = tape.mul(q, k, "attention").like(rows=self.batch * self.heads * self.length, width=self.keys)
        scores = scores.like(grad=scores.grad or bool(self.bias))
        wide = scores.like(itemsize=max(width, FLOAT if self.float_softmax else 0))
        if wide.grad:
            tape.save(wide, "attention")
        weights = tape.dropout(tape.cast(wide, width), self.dropout)
        weights = weights.like() if self.dropout else weights
        tape.mul(weights, v, "attention")  # keeps the weights for v, and v for the weights
        return q.like(k, v, grad=weights.grad or v.grad)
