"""What goes through a model in one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pefttutor.memory.attention import Attention
from pefttutor.memory.paper import INDEX, Paper
from pefttutor.memory.tape import Tape

__all__ = ["Step", "opened"]


@dataclass(frozen=True)
class Step:
    """What goes through the model: token ids (or pictures), and how attention is computed.

    >>> step = Step(batch_size=2, sequence_length=16, target_length=16, attention="sdpa")
    >>> step.ids(16).rows, step.heads(4).mode
    (32, 'sdpa')
    """

    batch_size: int
    sequence_length: int
    target_length: int  # how long an encoder-decoder's labels are
    attention: str
    padding: bool = False  # whether the texts of a batch differ in length
    prefix: int = 0  # keys and values before those of a text
    prefix_trains: bool = False

    def ids(self, length: int) -> Paper:
        return Paper(self.batch_size * length, 1, INDEX, False)

    def heads(
        self, heads: int, *, kv: int | None = None, window: int | None = None, **more: Any
    ) -> Attention:
        length = more.pop("length", self.sequence_length)
        before = self.prefix if "keys" not in more else 0  # it doesn't stand before another text's
        keys = more.pop("keys", length) + before
        causal = more.pop("causal", True)  # then a kernel needs to be told that all of a prefix is seen
        masked = self.padding or (causal and before > 0) or (window is not None and keys >= window)
        return Attention(
            self.batch_size,
            heads,
            kv or heads,
            length,
            keys,
            self.attention,
            masked=masked,
            before=before,
            before_trains=self.prefix_trains,
            **more,
        )

    def mask(self, length: int, keys: int, itemsize: int, *, causal: bool = False) -> Paper | None:
        """Which keys a token may see, where the model makes such a mask and hands it to its layers; None if it doesn't.

        Written-out attention adds a number of `itemsize` bytes, sdpa takes a byte for yes or no. causal: whether
        written-out attention needs one without padding too.

        >>> step = Step(batch_size=2, sequence_length=16, target_length=16, attention="eager")
        >>> step.mask(16, 16, 4), step.mask(16, 16, 4, causal=True).numel
        (None, 512)
        """
        before = self.prefix if causal else 0
        made = self.padding or (causal and self.attention == "eager") or before > 0
        if self.attention == "flash_attention_2" or not made:
            return None
        return Paper(
            self.batch_size * length, keys + before, itemsize if self.attention == "eager" else 1, False
        )


def opened(tape: Tape, model: Any, x: Paper, body: Any = None) -> Paper:
    """What goes into the blocks: virtual tokens that train and that `body` reads among the words require a gradient; so
    do, under checkpointing, frozen embeddings once something is attached.

    >>> from torch import nn
    >>> model, x = nn.Linear(2, 2), Paper(rows=4, width=8, itemsize=4, grad=False)
    >>> model.gradient_checkpointing = True
    >>> opened(Tape(), model, x).grad, opened(Tape(parts=["what is attached"]), model, x).grad
    (False, True)
    """
    virtual = [part for part in tape.parts if body is not None and part.covers(body)]
    learns = tape.trains(*(parameter for part in virtual for parameter in part.trained()))
    checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    wanted = learns or (tape.parts and checkpointed)
    return x.like(grad=True) if wanted and not x.grad else x
