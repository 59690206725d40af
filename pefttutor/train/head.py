"""`fit_head`: the converged head, the yardstick that every way of adapting inside a model is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from pefttutor.data.batches import Collate, collator
from pefttutor.data.checks import check_examples
from pefttutor.data.trial import evaluating, fresh_casts
from pefttutor.train.features import arriving, output_layer

__all__ = ["FittedHead", "fit_head"]

GRID = (1.0, 0.1, 0.01, 1e-3, 1e-4)
WIDEST = (100.0, 1e-7)
STEPS, GRADIENT = 2000, 1e-6  # LBFGS steps at most, and the largest entry of a gradient that counts as zero


@dataclass(frozen=True)
class FittedHead:
    """What `fit_head` found. tried: for each l2 the validation's accuracy (a share) and loss (nats)."""

    name: str
    l2: float
    tried: dict[float, dict[str, float]]
    rows: int
    steps: int

    @property
    def at_edge(self) -> bool:
        """Whether the chosen l2 is the smallest or the largest one tried, so that the best may lie beyond."""
        return self.l2 in (min(self.tried), max(self.tried))


@torch.inference_mode(mode=False)  # gradients are needed here, whatever the caller has switched off
def fit_head(
    model: nn.Module,
    train: Sequence[Any],
    validation: Sequence[Any],
    *,
    head: str | None = None,
    l2: Sequence[float] = GRID,
    batch_size: int = 64,
    collate: Collate | None = None,
) -> FittedHead:
    """Fit the head of a frozen model to the end, in seconds: all that its features tell a linear map, and no less.

        min over W, b of   mean CE(z Wᵀ + b, label) + l2/2 ‖W‖²,    z = (x − mean x) / std x, feature by feature

    (a head without a bias can't shift: there z = x / rms x).

    A head that gradient steps haven't trained to the end makes "adapting inside" look necessary where it isn't. Here
    the model runs once over the examples, what arrives at the head is kept, and LBFGS goes on until the gradient is
    zero: a convex problem with one solution, whatever the seed and without a learning rate. The l2 with the best
    accuracy on `validation` is taken (of equal ones that with the smaller loss); the grid goes on while it lies at
    its edge. Then the head's weights are replaced; nothing else in the model changes.

    >>> from pefttutor import data, models
    >>> model, words = models.load("campus-nano", head="classification", labels=["bad", "good"])
    >>> reviews = data.load("sentiment", n=64)
    >>> train, validation = (data.encode(reviews[split], words) for split in ("train", "validation"))
    >>> found = fit_head(model, train, validation)
    >>> found.name, found.rows, round(found.tried[found.l2]["accuracy"], 1)
    ('score', 64, 0.8)

    train, validation: examples as for `fit`, with a class for each text, or for each token (−100: none).
    head: the path of the output layer; None is the linear layer that is called last. l2: where the search begins.

    Shapes: features (rows, d), head (classes, d): one row for each label that isn't −100.
    Cost: one forward an example, rows · d numbers of 8 bytes, some 20–200 passes over rows · d · classes a value of l2.
    Raises: ValueError for labels that are no classes, a class that no training example has, features that aren't
        finite, logits that aren't the head's outputs or a weighted sum of them, a head that shares its weight, or that
        attachments have frozen (name it in modules_to_save); RuntimeError if LBFGS doesn't converge at the strongest
        l2 (where it doesn't at a weaker one, the search ends there).
    Source: Alain & Bengio 2016, arXiv:1610.01644; Liu & Nocedal 1989 for LBFGS.
    """
    if not l2 or not all(0 < value < float("inf") for value in l2):
        raise ValueError(f"l2={l2!r}; expected one or more positive numbers, such as {GRID}")
    for of, examples in (("train", train), ("validation", validation)):
        check_examples(model, examples, of, needs_labels=True)
        _check_classes(examples[0]["labels"], f"{of}[0]")
    stack = collate or collator(model)
    with evaluating(model), fresh_casts():
        name, layer = output_layer(model, stack([train[0]]), head)
        seen = {
            of: arriving(model, layer, name, stack, examples, batch_size)
            for of, examples in (("train", train), ("validation", validation))
        }
    x, labels = seen["train"]
    _check(x, labels, layer, per_text=train[0]["labels"].ndim == 0)
    shift = torch.zeros_like(x[0]) if layer.bias is None else x.mean(0)
    scale = (x - shift).square().mean(0).sqrt().clamp_min(1e-12)
    seen = {of: ((features - shift) / scale, answers) for of, (features, answers) in seen.items()}
    weight, bias, found = _search(seen, layer, name, sorted(set(l2), reverse=True))
    with torch.no_grad():
        layer.weight.copy_(weight / scale)
        if layer.bias is not None:
            layer.bias.copy_(bias - (weight / scale) @ shift)
    return found


# ---- what it refuses


def _check_classes(labels: Tensor, where: str) -> None:
    if labels.is_floating_point():
        raise ValueError(
            f"{where}: the labels are {labels.tolist()}; expected one class, a whole number, for each text or token"
        )


def _check(x: Tensor, labels: Tensor, layer: nn.Linear, *, per_text: bool) -> None:
    broken = int((~x.isfinite()).any(1).sum())
    if broken:
        raise ValueError(
            f"features of {broken} of {len(x)} rows aren't finite (NaN or infinite): the frozen model itself is "
            "broken, or its numbers are too large for its dtype; load it in float32"
        )
    absent = sorted(set(range(layer.out_features)) - set(labels.tolist())) if per_text else []
    if absent:
        raise ValueError(
            f"no training example has the class {', '.join(map(str, absent))} of {layer.out_features} (there are "
            f"{len(labels)} examples); draw more, or so many of each class, or give the model fewer labels"
        )


# ---- the convex problem


class _Unfinished(RuntimeError):
    """LBFGS has used up its steps."""


def _search(
    seen: dict[str, tuple[Tensor, Tensor]], layer: nn.Linear, name: str, grid: list[float]
) -> tuple[Tensor, Tensor, FittedHead]:
    """The weights at the best l2, in the scale of z; from strong to weak, each begun where the one before ended.

    Where a plane separates the classes, the minimum moves out of reach as the penalty falls: once LBFGS no longer
    finds it, the search ends.
    """
    shape = (layer.out_features, layer.in_features)
    start = (torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[0], dtype=torch.float64))
    fitted: dict[float, tuple[Tensor, Tensor]] = {}
    tried: dict[float, dict[str, float]] = {}
    steps, weakest = 0, WIDEST[1]
    while True:
        for l2 in [value for value in grid if value not in tried]:
            try:
                weight, bias, taken = _fitted(*seen["train"], *start, l2, has_bias=layer.bias is not None)
            except _Unfinished:
                if not tried or l2 > min(tried):
                    raise
                weakest, grid = min(tried), [value for value in grid if value > l2]
                break
            fitted[l2], steps = (weight, bias), steps + taken
            tried[l2] = _judged(*seen["validation"], weight, bias)
            start = fitted[l2]
        best = min(grid, key=lambda value: (-tried[value]["accuracy"], tried[value]["loss"]))
        if best == grid[0] < WIDEST[0]:
            grid = [_next(grid[0], 10), *grid]
        elif best == grid[-1] > weakest:
            grid = [*grid, _next(grid[-1], 0.1)]
        else:
            found = FittedHead(name, best, dict(sorted(tried.items())), len(seen["train"][0]), steps)
            return *fitted[best], found


def _next(l2: float, factor: float) -> float:
    return float(f"{l2 * factor:.6g}")  # 1e-06, not 1.0000000000000002e-06


def _fitted(
    z: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, l2: float, *, has_bias: bool
) -> tuple[Tensor, Tensor, int]:
    """The minimum, to the end, and the steps that it took."""
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_(has_bias)
    free = [weight, bias] if has_bias else [weight]
    optimizer = torch.optim.LBFGS(
        free, max_iter=STEPS, max_eval=2 * STEPS, history_size=20, tolerance_grad=GRADIENT, tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(linear(z, weight, bias), labels) + l2 / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
        closure()
    left = max(float(p.grad.abs().max()) for p in free if p.grad is not None)
    steps = optimizer.state[free[0]]["n_iter"]
    if not left <= 100 * GRADIENT:
        raise _Unfinished(
            f"with l2={l2:g} the gradient is {left:.1e} after {steps} steps, not zero; try a larger l2"
        )
    return weight.detach(), bias.detach(), steps


def _judged(z: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> dict[str, float]:
    logits = linear(z, weight, bias)
    return {
        "accuracy": (logits.argmax(-1) == labels).double().mean().item(),
        "loss": cross_entropy(logits, labels).item(),
    }
