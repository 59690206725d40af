"""A tensor on paper: how many numbers, how wide, whether a gradient flows into it; no values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

__all__ = ["FLOAT", "INDEX", "KINDS", "Paper"]

KINDS = ("embeddings", "attention", "ffn", "norms", "dropout", "layer inputs", "logits and loss")
FLOAT = 4  # bytes: what norms, softmax and the loss compute in
INDEX = 8  # bytes of an integer label or token id


@dataclass(eq=False, frozen=True)
class Paper:
    """A tensor's outline.

    >>> x = Paper(rows=6, width=4, itemsize=2, grad=True)
    >>> x.numel, x.view(rows=3, width=8).storage is x, x.like(width=8).storage is x
    (24, True, False)

    itemsize: bytes a value. grad: whether a gradient flows into it.
    again: whether `kernels.recompute` would make it again rather than keep it. own: the tensor that it is a view of.

    Shapes: (rows, width), with rows = batch · sequence where nothing else is said.
    """

    rows: int
    width: int
    itemsize: int
    grad: bool
    again: bool = False
    own: Paper | None = None

    @property
    def numel(self) -> int:
        return self.rows * self.width

    @property
    def storage(self) -> Paper:
        return self.own or self

    def view(self, rows: int | None = None, width: int | None = None) -> Paper:
        """The same storage under another shape."""
        rows, width = rows or self.rows, width or self.width
        return replace(self, rows=rows, width=width, again=False, own=self.storage)

    def like(self, *others: Paper, **changes: Any) -> Paper:
        """A new tensor of this outline, with a gradient if this tensor or one of the others has one."""
        grad = any(paper.grad for paper in (self, *others))
        return replace(self, **({"grad": grad, "again": False, "own": None} | changes))
