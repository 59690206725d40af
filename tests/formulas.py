"""What the methods of chapter 4.4 add to a weight, by their formulas from what is saved: dense, and slow.

Each formula gets the tensors of one layer by their keys, how many features go in and come out, the method, and the
model, for what layers share. A method's line here serves its own tests and the matrix of architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

Tensors = Mapping[str, Tensor]
Formula = Callable[[Tensors, int, int, Any, nn.Module], Tensor]


def vera(t: Tensors, n_in: int, n_out: int, method: Any, model: nn.Module) -> Tensor:
    A, B = model.get_buffer("vera_A")[:, :n_in], model.get_buffer("vera_B")[:n_out]
    return t["vera_lambda_b"].diag() @ B @ t["vera_lambda_d"].diag() @ A


# By the key that a layer must hold for it, and the keys of all that the formula uses.
FORMULAS: dict[str, tuple[Formula, tuple[str, ...]]] = {
    "vera_lambda_b": (vera, ("vera_lambda_b", "vera_lambda_d")),
}
USED = {key for _, keys in FORMULAS.values() for key in keys}
