"""What arrives at a model's output layer: its features, one row for each label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pefttutor.data.batches import Collate
from pefttutor.data.targets import IGNORED, aligned, predicts_next
from pefttutor.method import attached

__all__ = ["arriving", "output_layer"]


def output_layer(model: nn.Module, batch: dict[str, Tensor], name: str | None) -> tuple[str, nn.Linear]:
    """The output layer and its path: the linear layer that is called last, or the named one.

    Raises: ValueError if there is none of that name, if it shares its weight, or if an attachment has it frozen.
    """
    names = {module: path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    called: list[nn.Linear] = []
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("this model has no weights yet (it is on the meta device): load them first")
    hooks = [module.register_forward_hook(lambda module, *_: called.append(module)) for module in names]
    try:
        with torch.no_grad():
            output = model(**_moved(model, batch))
    finally:
        for hook in hooks:
            hook.remove()
    if getattr(output, "logits", None) is None:
        raise ValueError(
            f"{type(model).__name__} returns no logits; expected a model with a head, such as one that "
            "pefttutor.models.load(name, head=…) gives"
        )
    if not called:
        raise ValueError(f"{type(model).__name__} calls no nn.Linear; fit_head needs one as its output layer")
    if name is not None and name not in names.values():
        last = names[called[-1]]
        raise ValueError(f"head={name!r} is no linear layer of the model; the last one called is {last!r}")
    layer = called[-1] if name is None else next(m for m, path in names.items() if path == name)
    shared = [n for n, p in model.named_parameters(remove_duplicate=False) if p is layer.weight]
    if len(shared) > 1:
        raise ValueError(
            f"the head's weight is shared: {' and '.join(map(repr, shared))} are one tensor, and the model would "
            "change below its head; untie it first: head.weight = nn.Parameter(head.weight.detach().clone())"
        )
    _check_kept(model, layer, names[layer])
    return names[layer], layer


def _check_kept(model: nn.Module, layer: nn.Linear, name: str) -> None:
    """Raise unless what is fitted here comes back with what is attached, whose files know the base as it was."""
    there = attached(model)
    parts = [part for a in there.values() if a.active and not a.merged for part in a.parts]
    if there and not any(tensor is layer.weight for part in parts for _, tensor in part.saved()):
        raise ValueError(
            f"{name!r} belongs to the frozen base of {', '.join(map(repr, there))}, and a saved adapter wouldn't bring "
            f"it back; attach with modules_to_save=({name!r},), or fit the head before attaching"
        )


def _moved(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items()}


def arriving(
    model: Any, layer: nn.Linear, name: str, stack: Collate, examples: Sequence[Any], batch_size: int
) -> tuple[Tensor, Tensor]:
    """What arrives at the head for each label, in float64 on the CPU, and the labels. Shapes: (rows, d), (rows)."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].get("input_ids", ())))
    found = []
    for start in range(0, len(order), batch_size):
        batch = _moved(model, stack([examples[i] for i in order[start : start + batch_size]]))
        x = _features(model, layer, name, batch)
        x, labels = aligned(x, batch["labels"], shifted=predicts_next(model, batch))
        counted = labels != IGNORED
        found.append((x[counted].double().cpu(), labels[counted].cpu()))
    return torch.cat([x for x, _ in found]), torch.cat([labels for _, labels in found])


def _features(model: Any, layer: nn.Linear, name: str, batch: dict[str, Tensor]) -> Tensor:
    """The features that make the model's logits. Shape: (batch, d), or (batch, seq, d) where each token has some."""
    calls: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        calls.append((args[0].detach(), output.detach().requires_grad_()))
        torch.set_grad_enabled(True)  # from here on: which of the outputs become logits is asked of autograd
        return calls[-1][1]

    hook = layer.register_forward_hook(note)
    try:
        with torch.no_grad():
            logits = model(**batch).logits
    finally:
        hook.remove()
    x, y = calls[0]
    if len(calls) == 1 and logits.shape != y.shape and logits.ndim == 2 and y.ndim == 3:
        # Logits of a text are a sum over its positions: share · output, with the shares that a gradient tells.
        share = torch.autograd.grad(logits[:, 0].sum(), y)[0][..., 0].to(x.dtype)
        x = torch.einsum("bt,btd->bd", share, x)
    with torch.no_grad():
        again = linear(x, layer.weight, layer.bias)
    same = again.shape == logits.shape and torch.allclose(again, logits, rtol=1e-3, atol=1e-3, equal_nan=True)
    if len(calls) != 1 or not same:
        raise ValueError(
            f"the logits of {type(model).__name__} aren't what its layer {name!r} returns, nor a weighted sum of that "
            f"over a text ({len(calls)} calls); name the output layer: head='…', and detach what changes it"
        )
    return x
