"""The diagonal of the Fisher information: each sample's gradient, squared, then summed, in one pass for a batch.

    F_i = (1/|D|) Σ_s (∂ log p(y_s | x_s) / ∂θ_i)²                             empirical: y_s is the label
    F_i = (1/|D|) Σ_s Σ_y p(y | x_s) (∂ log p(y | x_s) / ∂θ_i)²                true: the model's own expectation

The square must come before the sum. The square of a batch's gradient mixes the samples, (Σ_s g_s)² ≠ Σ_s g_s², and
autograd only gives the sum. Why this is fast, against a backward pass a sample:

- one forward and one backward for the whole batch, and the backward computes no gradient of any weight;
- each sample's gradient of a layer is made from the layer's input and its output's gradient, at the cost of the
  batch's own (see `per_sample`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.kernels import per_sample

__all__ = ["checked_squares", "squared_gradients", "squared_gradients_reference"]


def squared_gradients_reference(module: nn.Module, forward: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Σ_s (∂ℓ_s/∂θ)² for every parameter that requires a gradient: one backward pass a sample, as the formula says.

    forward() runs the module and returns ℓ. Shapes: ℓ (B) or (C, B) → by name, each parameter's shape.
    """
    parameters = _trained(module)
    total = {name: _zeros(p) for name, p in parameters.items()}
    values = forward()
    reached = torch.autograd.grad(
        values.sum(), list(parameters.values()), retain_graph=True, allow_unused=True
    )
    names = [name for name, grad in zip(parameters, reached, strict=True) if grad is not None]
    for value in values.flatten() if names else ():
        grads = torch.autograd.grad(
            value, [parameters[n] for n in names], retain_graph=True, allow_unused=True
        )
        for name, grad in zip(names, grads, strict=True):
            if grad is not None:
                total[name] += grad.to(total[name].dtype).square()
    return total


def squared_gradients(
    module: nn.Module,
    forward: Callable[[], Tensor],
    *,
    samples: int,
    max_bytes: int = 1 << 26,
    check: bool = True,
) -> dict[str, Tensor]:
    """Σ_s (∂ℓ_s/∂θ)², the same as `squared_gradients_reference`, in one pass.

    forward() runs the module on a batch of `samples` and returns ℓ_s, one value a sample (a log-likelihood); or C
    rows of them, whose squares are added (√p · log p of each label gives the true Fisher). It may be called twice
    and must give the same: evaluation mode, no dropout. ℓ_s may depend on sample s alone.

    One pass covers Linear, Conv1D, Embedding (also one row of positions for all samples), LayerNorm, RMSNorm, their
    biases and weights tied between them. Any other parameter that ℓ depends on is left to the reference: right, but
    a backward pass a sample. A weight that a known layer holds must be used by calling that layer.

    check: prove, by a backward pass of the first sample alone, that a layer's rows are the samples; a layer where
        they aren't (T5's position bias, in a batch as large as its texts are long) is left to the reference too.
    max_bytes: of the one gradient that exists at a time; a larger weight is taken some rows at a time.

    Shapes: ℓ (B) or (C, B) → by name, each parameter's shape, in float32 (float64 for float64).
    Cost: for T tokens a forward, C backwards to activations, 2·C·T·in·out FLOPs a layer; kept: every layer's input
        and its output's gradient.
    Raises: ValueError if nothing requires a gradient or ℓ has another shape; FloatingPointError for NaN or infinity.
    Source: chapter eq. 4.8 and 4.9; Sung et al. 2021, arXiv:2111.09839, eq. 3 and 4.
    """
    return checked_squares(module, forward, samples=samples, max_bytes=max_bytes, check=check)[0]


def checked_squares(
    module: nn.Module,
    forward: Callable[[], Tensor],
    *,
    samples: int,
    max_bytes: int = 1 << 26,
    check: bool = True,
) -> tuple[dict[str, Tensor], bool]:
    """`squared_gradients`, and whether all rows were samples: if so, batches of the same shapes need no other check."""
    parameters = _trained(module)
    total = {name: _zeros(p) for name, p in parameters.items()}
    uses: list[_Use] = []
    known = _known(module, parameters.values())
    with _watched(module, known, uses, samples), _training(parameters.values(), ()):
        values = forward()
    if values.dim() not in (1, 2) or values.shape[-1] != samples:
        raise ValueError(
            f"squared_gradients: forward() returned {tuple(values.shape)}, expected one value a sample: "
            f"({samples},), or (labels, {samples})"
        )
    if not values.isfinite().all():
        raise FloatingPointError(f"squared_gradients: forward() returned NaN or infinity: {values.tolist()}")
    right = [use for use in uses if use.by_sample] if values.requires_grad else []
    claimed = len(right)
    if check and right:
        right = [use for use, good in zip(right, _separate(values, right), strict=True) if good]
    wrong = [use for use in uses if use not in right]
    left = {p for use in wrong for p in use.layer._parameters.values()}
    by_parameter: dict[Tensor, list[tuple[_Use, str]]] = {}
    for use in right:
        for name, p in use.layer._parameters.items():
            if p is not None and p in known and p not in left:
                by_parameter.setdefault(p, []).append((use, name))
    names = {parameter: name for name, parameter in parameters.items()}
    for row in values.reshape(-1, samples) if right else ():
        grads = torch.autograd.grad(
            row.sum(), [use.output for use in right], retain_graph=True, allow_unused=True
        )
        deltas = {id(use): grad for use, grad in zip(right, grads, strict=True)}
        for parameter, where in by_parameter.items():
            _add(where, deltas, total[names[parameter]], samples, max_bytes)
    rest = [parameter for parameter in parameters.values() if parameter not in by_parameter]
    if rest:
        with _training(parameters.values(), rest):
            total |= squared_gradients_reference(module, forward)
    for name, value in total.items():
        if not value.isfinite().all():
            raise FloatingPointError(
                f"squared_gradients: the gradient of {name!r} has NaN or infinite entries"
            )
    return total, len(right) == claimed


@dataclass(eq=False)
class _Use:
    """One call of a layer: what went in and what came out."""

    layer: nn.Module
    input: Tensor
    output: Tensor
    by_sample: bool


def _add(
    where: list[tuple[_Use, str]], deltas: dict[int, Any], into: Tensor, samples: int, max_bytes: int
) -> None:
    found = []
    for use, name in where:
        delta = deltas[id(use)]
        if delta is None:
            continue  # the value doesn't depend on this call
        a = use.input.reshape(samples, -1) if per_sample.kind_of(use.layer) == "embedding" else _3d(use.input)
        a = per_sample.scaled_input(use.layer, a) if per_sample.kind_of(use.layer) == "norm" else a
        found.append((use.layer, name, a, _3d(delta)))
    if found and not (len(found) == 1 and per_sample.own_squares(*found[0], into)):
        per_sample.squares(found, into, samples=samples, max_bytes=max_bytes)


def _3d(tensor: Tensor) -> Tensor:
    """(B, features) or (B, …, features) → (B, T, features)."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


def _separate(values: Tensor, uses: list[_Use]) -> list[bool]:
    """Whether the first sample's value depends on the first row of each output only."""
    first = values.reshape(-1, values.shape[-1])[:, 0].sum()
    grads = torch.autograd.grad(first, [u.output for u in uses], retain_graph=True, allow_unused=True)
    return [grad is None or not grad[1:].any() for grad in grads]


def _known(module: nn.Module, wanted: Any) -> set[Tensor]:
    """The parameters all of whose owners are layers that `per_sample` knows."""
    owners: dict[Tensor, list[nn.Module]] = {p: [] for p in wanted}
    for layer in module.modules():
        for p in layer._parameters.values():
            if p in owners:
                owners[p].append(layer)
    return {p for p, layers in owners.items() if layers and all(map(per_sample.knows, layers))}


@contextmanager
def _watched(module: nn.Module, known: set[Tensor], uses: list[_Use], samples: int) -> Iterator[None]:
    handles = []
    for layer in module.modules():
        if any(p in known for p in layer._parameters.values()):
            hook = partial(_note, uses, samples)
            handles.append(layer.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note(uses: list[_Use], samples: int, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
    given = args[0] if args else next(iter(kwargs.values()))
    if isinstance(layer, nn.Embedding) and len(given) == 1 < samples:  # positions, the same for all samples
        given, output = (t.expand(samples, *t.shape[1:]) for t in (given, output))
    if not output.requires_grad:
        output = output.detach().requires_grad_().clone()  # the clone may be changed in place
    uses.append(_Use(layer, given.detach(), output, output.dim() > 1 and len(output) == samples))
    return output


@contextmanager
def _training(parameters: Any, only: Any) -> Iterator[None]:
    """Let gradients flow to `only`, for the block."""
    parameters, chosen = list(parameters), set(only)
    try:
        for p in parameters:
            p.requires_grad_(p in chosen)
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def _trained(module: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError(
            "squared_gradients: no parameter requires a gradient; call requires_grad_(True) first"
        )
    return found


def _zeros(p: Tensor) -> Tensor:
    return torch.zeros_like(p, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32)
