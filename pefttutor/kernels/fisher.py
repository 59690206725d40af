"""The diagonal of the Fisher information: each sample's gradient, squared, then summed, in one pass for a batch.

    F_i = (1/|D|) Σ_s (∂ log p(y_s | x_s) / ∂θ_i)²                             empirical: y_s is the label
    F_i = (1/|D|) Σ_s Σ_y p(y | x_s) (∂ log p(y | x_s) / ∂θ_i)²                true: the model's own expectation

The square must come before the sum. The square of a batch's gradient mixes the samples, (Σ_s g_s)² ≠ Σ_s g_s², and
autograd only gives the sum. Why this is fast, against a backward pass a sample:

- one forward and one backward for the whole batch, and the backward computes no gradient of any weight;
- each sample's gradient of a layer is made from the layer's input and its output's gradient, at the cost of the
  batch's own (see `per_sample`), and tokens that got no gradient are left out;
- threads share that work in parts that stay in the cache while they are squared and summed (see `threads`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set

import torch
from torch import Tensor, nn

from pefttutor.kernels.layer_calls import Call, known_parameters, training, visit, watched
from pefttutor.kernels.squares import Squares

__all__ = [
    "add_squared_gradients",
    "check_finite",
    "no_squares",
    "squared_gradients",
    "squared_gradients_reference",
]


def squared_gradients_reference(module: nn.Module, forward: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Σ_s (∂ℓ_s/∂θ)² for every parameter that requires a gradient: one backward pass a sample, as the formula says.

    >>> layer, x = nn.Linear(1, 1, bias=False), torch.tensor([[3.0], [-3.0]])
    >>> squared_gradients_reference(layer, lambda: layer(x)[:, 0])      # 3² + (−3)², not (3 − 3)²
    {'weight': tensor([[18.]])}

    forward() runs the module and returns ℓ. Shapes: ℓ (B) or (C, B) → by name, each parameter's shape.
    """
    total = no_squares(module)
    _add_one_by_one(forward, _trained(module), total)
    return total


def squared_gradients(
    module: nn.Module,
    forward: Callable[[], Tensor],
    *,
    samples: int,
    max_bytes: int = 1 << 26,
) -> dict[str, Tensor]:
    """Σ_s (∂ℓ_s/∂θ)², the same as `squared_gradients_reference`, in one pass.

    >>> layer, x = nn.Linear(1, 1, bias=False), torch.tensor([[3.0], [-3.0]])
    >>> squared_gradients(layer, lambda: layer(x)[:, 0], samples=2)     # 3² + (−3)², not (3 − 3)²
    {'weight': tensor([[18.]])}

    forward() runs the module on a batch of `samples` and returns ℓ_s, one value a sample (a log-likelihood); or C
    rows of them, whose squares are added (√p · log p of each label gives the true Fisher). It may be called twice
    and must give the same: evaluation mode, no dropout. ℓ_s may depend on sample s alone.

    One pass covers Linear, Conv1D, Embedding (also one row of positions for all samples), LayerNorm, RMSNorm, their
    biases and weights tied between them. Any other parameter that ℓ depends on is left to the reference: right, but
    a backward pass a sample. So is a weight that ℓ also reaches without a call of its layer (`h @ emb.weight.T`).

    That a layer's rows are the samples is proved, by a backward pass of the first sample alone, and of every sample
    where that may not show it (`_doubtful`); a layer where they aren't (T5's position bias, in a batch as large as
    its texts are long) is left to the reference too.

    max_bytes: of the gradients that exist at a time; a larger weight is taken some rows at a time. Beside them
        nothing is as large as the weights, except what is left to the reference.

    Shapes: ℓ (B) or (C, B) → by name, each parameter's shape, in float32 (float64 for float64).
    Cost: for T tokens a forward, C backwards to activations, 2·C·T·in·out FLOPs a layer; kept: every layer's input
        and its output's gradient.
    Raises: ValueError if nothing requires a gradient or ℓ has another shape; FloatingPointError for NaN or infinity.
    Source: chapter eq. 4.8 and 4.9; Sung et al. 2021, arXiv:2111.09839, eq. 3 and 4.
    """
    total = no_squares(module)
    add_squared_gradients(module, forward, total, samples=samples, max_bytes=max_bytes)
    check_finite(total)
    return total


def no_squares(module: nn.Module) -> dict[str, Tensor]:
    """Zeros, to add squares to: by name, for each parameter that requires a gradient.

    >>> no_squares(nn.Linear(2, 1, bias=False).bfloat16())              # a sum needs more digits
    {'weight': tensor([[0., 0.]])}
    """
    return {
        name: torch.zeros_like(p, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32)
        for name, p in _trained(module).items()
    }


def check_finite(total: Mapping[str, Tensor]) -> None:
    """Raise FloatingPointError if a sum of squares has NaN or infinite entries.

    >>> check_finite({"weight": torch.tensor([1.0, torch.inf])})
    Traceback (most recent call last):
    FloatingPointError: squared_gradients: the gradient of 'weight' has NaN or infinite entries
    """
    # Of squares NaN and infinity are the largest. A device is asked once, for all of its tensors.
    largest = {name: value.amax() for name, value in total.items() if value.numel()}
    for device in {value.device for value in largest.values()}:
        here = {name: value for name, value in largest.items() if value.device == device}
        finite = torch.stack([value.isfinite() for value in here.values()]).tolist()
        if not all(finite):
            name = list(here)[finite.index(False)]
            raise FloatingPointError(
                f"squared_gradients: the gradient of {name!r} has NaN or infinite entries"
            )


@torch.enable_grad()
def add_squared_gradients(
    module: nn.Module,
    forward: Callable[[], Tensor],
    total: Mapping[str, Tensor],
    *,
    samples: int,
    max_bytes: int = 1 << 26,
    trusted: Set[nn.Module] = frozenset(),
) -> set[nn.Module]:
    """Add `squared_gradients` of one batch to `total`, in place and without `check_finite`.

    >>> layer, total = nn.Linear(1, 1, bias=False), {"weight": torch.zeros(1, 1)}
    >>> for x in (torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])):
    ...     _ = add_squared_gradients(layer, lambda: layer(x)[:, 0], total, samples=2)
    >>> total                                                           # 1² + 2² + 3² + 4²
    {'weight': tensor([[30.]])}

    Returns the layers that were seen to have the samples as rows, in every call; the next batch may pass them as
    trusted. Best found out with two samples, which costs least, and hardly anything else comes in twos. What has two
    dimensions isn't trusted: it can be an expert's tokens, by chance as many as there are samples.
    """
    parameters = _trained(module)
    known = known_parameters(module, parameters.values())
    with training(parameters.values(), known), watched(module, known, samples) as calls:
        values = forward()
    _check_values(values, samples)
    left = (set(parameters.values()) - known) | _reached(values, known)
    right = [call for call in calls if call.by_sample and call.is_whole] if values.requires_grad else []
    unproved = [call for call in right if call.layer not in trusted or call.output.dim() < 3]
    wrong, unseen = _mixed(values, unproved, _doubtful(calls, samples)) if unproved else (set(), set())
    right = [call for call in right if call not in wrong]
    left |= {p for call in calls if call not in right for p in call.layer._parameters.values() if p in known}
    sums = {p: total[name] for name, p in parameters.items() if p not in left}
    for row in values.reshape(-1, samples) if right and sums else ():
        squares = Squares(right, sums, max_bytes)
        visit(row.sum(), right, squares.add)
        squares.finish()
    if left:
        with training(parameters.values(), left):
            _add_one_by_one(forward, {name: p for name, p in parameters.items() if p in left}, total)
    return {call.layer for call in right} - {c.layer for c in calls if c not in right or c in unseen}


@torch.enable_grad()
def _add_one_by_one(
    forward: Callable[[], Tensor], parameters: Mapping[str, Tensor], total: Mapping[str, Tensor]
) -> None:
    values = forward()
    for value in values.flatten() if values.requires_grad else ():
        grads = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                grad = grad.to(total[name].dtype)
                total[name].addcmul_(grad, grad)


def _check_values(values: Tensor, samples: int) -> None:
    if values.dim() not in (1, 2) or values.shape[-1] != samples:
        raise ValueError(
            f"squared_gradients: forward() returned {tuple(values.shape)}, expected one value a sample: "
            f"({samples},), or (labels, {samples})"
        )
    if not values.isfinite().all():
        raise FloatingPointError(f"squared_gradients: forward() returned NaN or infinity: {values.tolist()}")


def _reached(values: Tensor, known: set[Tensor]) -> set[Tensor]:
    """The parameters that the values reach directly; where there are none, this only walks through the graph."""
    if not (known and values.requires_grad):
        return set()
    wanted = list(known)
    grads = torch.autograd.grad(values.sum(), wanted, retain_graph=True, allow_unused=True)
    return {p for p, grad in zip(wanted, grads, strict=True) if grad is not None}


def _mixed(values: Tensor, calls: list[Call], doubtful: Set[Call]) -> tuple[set[Call], set[Call]]:
    """The calls of which a sample's value depends on another row of the output than its own, and those of which it
    doesn't depend on its own row either, which says nothing of other batches.

    The first sample is asked, and of doubtful calls every sample.
    """
    samples = values.shape[-1]
    mixed, unseen = set(), set()
    for s in range(samples):
        asked = [call for call in calls if s == 0 or call in doubtful]
        if not asked:
            break
        answers = _rows_reached(values.reshape(-1, samples)[:, s].sum(), asked, s)
        unseen |= {call for call in asked if call not in answers or not answers[call][0]}
        mixed |= {call for call, (_, others) in answers.items() if others}
    return mixed, unseen


def _rows_reached(value: Tensor, calls: list[Call], sample: int) -> dict[Call, list[bool]]:
    """For each call that the value depends on: on the sample's own row of its output, and on another one?"""
    found: dict[Call, Tensor] = {}

    def note(call: Call, grad: Tensor) -> None:
        rows = grad.flatten(1).any(1)  # (B)
        others = rows.clone()
        others[sample] = False
        found[call] = torch.stack([rows[sample], others.any()]).to(value.device)

    visit(value, calls, note)
    answers = torch.stack(list(found.values())).tolist() if found else []  # one question to the device
    return dict(zip(found, answers, strict=True))


def _doubtful(calls: list[Call], samples: int) -> set[Call]:
    """Where the first sample alone may not show that rows are no samples: as many tokens as samples, or two
    dimensions in a model that also has tokens in a row (an expert of a mixture gets any number of them)."""
    tokens = any(not call.by_sample for call in calls)
    return {
        call
        for call in calls
        if samples == 2 or (tokens if call.output.dim() == 2 else call.output.shape[1] == samples)
    }


def _trained(module: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError(
            "squared_gradients: no parameter requires a gradient; call requires_grad_(True) first"
        )
    return found
