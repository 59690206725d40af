"""A sum of bytes by what they are for, and what was measured beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pefttutor.memory.measured import Measured

__all__ = ["GIB", "Breakdown", "Comparison", "compare"]

GIB = 2**30
PARTS = {
    "weights": "weights",
    "quantized_weights": "quantised weights",
    "adapter_weights": "adapter weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "kv_cache": "keys and values",
}


@dataclass(frozen=True)
class Breakdown:
    """Bytes of one training step, or of serving a model.

    >>> print(Breakdown(weights=2**30, gradients=2**29))
    weights                              1.000 GiB
    gradients                            0.500 GiB
    total                                1.500 GiB

    weights: those of the base, in the weights' dtype. quantized_weights: those of the layers that are quantised, their
    scales included. adapter_weights: what the method added. gradients and optimizer: what belongs to the values that
    train. activations: by kind, what is kept for the backward pass at its fullest moment. kv_cache: the keys and values
    that serving keeps. values, trained: how many numbers there are and how many of them train; these aren't bytes.
    """

    weights: int = 0
    quantized_weights: int = 0
    adapter_weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: dict[str, int] = field(default_factory=dict)
    kv_cache: int = 0
    values: int = 0
    trained: int = 0

    @property
    def total(self) -> int:
        return sum(self.as_dict().values())

    def as_dict(self) -> dict[str, int]:
        """Bytes by part, in the order of a bar chart; activations stand there by kind, as "activations: norms"."""
        parts = {words: getattr(self, name) for name, words in PARTS.items()}
        return parts | {f"activations: {kind}": size for kind, size in self.activations.items()}

    def __str__(self) -> str:
        rows = [*((name, size) for name, size in self.as_dict().items() if size), ("total", self.total)]
        return "\n".join(f"{name:30}{size / GIB:12.3f} GiB" for name, size in rows)


@dataclass(frozen=True)
class Comparison:
    """One part in bytes, as estimated and as measured, and the ratio estimated / measured (1 when both are 0).

    >>> Comparison(estimated=50, measured=100).ratio
    0.5
    """

    estimated: int
    measured: int

    @property
    def ratio(self) -> float:
        if not self.measured:
            return float("inf") if self.estimated else 1.0
        return self.estimated / self.measured


def compare(estimated: Breakdown, measured: Measured) -> dict[str, Comparison]:
    """Put an estimate beside a measurement, part by part: weights, gradients, optimizer, activations.

    >>> measured = Measured(100, 100, 200, activations=40, by_layer={}, allocator_peak=0, resident_growth=None)
    >>> estimated = Breakdown(weights=100, gradients=100, optimizer=200, activations={"ffn": 30})
    >>> {part: both.ratio for part, both in compare(estimated, measured).items()}
    {'weights': 1.0, 'gradients': 1.0, 'optimizer': 1.0, 'activations': 0.75}

    Raises: ValueError if the measurement knows no weights; `measure` needs model= for that.
    """
    if not measured.weights:
        raise ValueError("nothing to compare: call measure(step, model=model, optimizer=optimizer)")
    weights = estimated.weights + estimated.quantized_weights + estimated.adapter_weights
    pairs: dict[str, Any] = {
        "weights": (weights, measured.weights),
        "gradients": (estimated.gradients, measured.gradients),
        "optimizer": (estimated.optimizer, measured.optimizer),
        "activations": (sum(estimated.activations.values()), measured.activations),
    }
    return {part: Comparison(*pair) for part, pair in pairs.items()}
