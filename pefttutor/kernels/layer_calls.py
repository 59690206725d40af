"""Watch a forward: what went into each layer whose parameters are measured, and what came out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.kernels import per_sample, threads

__all__ = ["Call", "known_parameters", "training", "visit", "watched"]

KEPT = 1 << 24  # bytes of gradients that a backward pass may keep until its end


@dataclass(eq=False)
class Call:
    """One call of a layer: what went in and what came out."""

    layer: nn.Module
    input: Tensor
    output: Tensor
    by_sample: bool

    def __post_init__(self) -> None:
        self.version = self.output._version

    @property
    def is_whole(self) -> bool:
        """Whether the output is still what came out: nothing has changed it in place."""
        return self.output._version == self.version


def known_parameters(module: nn.Module, wanted: Iterable[Tensor]) -> set[Tensor]:
    """The parameters all of whose owners are layers that `per_sample` knows.

    >>> model = nn.Sequential(nn.Linear(1, 1), nn.PReLU())
    >>> len(known_parameters(model, model.parameters()))                # the linear layer's weight and bias
    2
    """
    owners: dict[Tensor, list[nn.Module]] = {p: [] for p in wanted}
    for layer in module.modules():
        for p in layer._parameters.values():
            if p in owners:
                owners[p].append(layer)
    return {p for p, layers in owners.items() if layers and all(map(per_sample.knows, layers))}


@contextmanager
def watched(module: nn.Module, known: set[Tensor], samples: int) -> Iterator[list[Call]]:
    """Note every call of the layers that hold a known parameter, and let it compute with detached ones.

    So the graph has each call's output, and reaches a known parameter only where its layer wasn't called for it:
    `h @ embedding.weight.T`.

    >>> layer = nn.Linear(1, 3)
    >>> with watched(layer, set(layer.parameters()), samples=2) as calls:
    ...     _ = layer(torch.ones(2, 1))
    >>> [(tuple(call.input.shape), tuple(call.output.shape), call.by_sample) for call in calls]
    [((2, 1), (2, 3), True)]
    """
    calls: list[Call] = []
    handles, detached = [], []
    for layer in module.modules():
        own = {name: p.detach() for name, p in layer._parameters.items() if p is not None and p in known}
        if own:
            detached.append((layer, own))
            handles.append(layer.register_forward_pre_hook(partial(_detach, own)))
            handles.append(layer.register_forward_hook(partial(_note, calls, samples, own), with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
        for layer, own in detached:
            _attach(own, layer)


def _detach(own: dict[str, Tensor], layer: nn.Module, args: Any) -> None:
    """An attribute of the layer's own is found before its parameter; one that is there already stays."""
    vars(layer).update({name: value for name, value in own.items() if name not in vars(layer)})


def _attach(own: dict[str, Tensor], layer: nn.Module) -> None:
    for name, value in own.items():
        if vars(layer).get(name) is value:
            del vars(layer)[name]


def _note(
    calls: list[Call],
    samples: int,
    own: dict[str, Tensor],
    layer: nn.Module,
    args: Any,
    kwargs: Any,
    output: Any,
) -> Tensor:
    _attach(own, layer)
    if not torch.is_grad_enabled():
        return output  # the value doesn't depend on this call, for autograd
    given = args[0] if args else next(iter(kwargs.values()))
    # Positions, the same for all samples. A single number can be T5's one distance, which has no place for samples.
    if isinstance(layer, nn.Embedding) and len(given) == 1 < samples and given.numel() > 1:
        given, output = (t.expand(samples, *t.shape[1:]) for t in (given, output))
    if not output.requires_grad:
        output = output.detach().requires_grad_().clone()  # the clone may be changed in place
    calls.append(Call(layer, given.detach(), output, output.dim() > 1 and len(output) == samples))
    return output


@contextmanager
def training(parameters: Iterable[Tensor], only: Iterable[Tensor]) -> Iterator[None]:
    """Let gradients flow to `only`, for the block.

    >>> layer = nn.Linear(1, 1)
    >>> with training(layer.parameters(), [layer.bias]):
    ...     layer.weight.requires_grad, layer.bias.requires_grad
    (False, True)
    """
    parameters, chosen = list(parameters), set(only)
    try:
        for p in parameters:
            p.requires_grad_(p in chosen)
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def visit(value: Tensor, calls: Sequence[Call], note: Callable[[Call, Tensor], None]) -> None:
    """note(call, gradient of `value` at the call's output), in one backward pass, for each call that it reaches.

    Where the gradients are many, each is noted as the pass comes to it, and may be freed while it goes on to the ends
    of the graph. Where they are few it is faster to stop at the last of these outputs, and to note all of them then.

    >>> layer = nn.Linear(1, 1)
    >>> with watched(layer, set(layer.parameters()), samples=2) as calls:
    ...     value = 5 * layer(torch.ones(2, 1)).sum()
    >>> visit(value, calls, lambda call, gradient: print(gradient.tolist()))
    [[5.0], [5.0]]
    """
    outputs = [call.output for call in calls]
    most = 0 if threads.short_way(value.device) else KEPT
    if sum(output.nbytes for output in outputs) <= most:
        grads = torch.autograd.grad(value, outputs, retain_graph=True, allow_unused=True)
        for call, grad in zip(calls, grads, strict=True):
            _noted(note, call, grad)
        return
    handles = [
        output.register_hook(partial(_noted, note, call)) for call, output in zip(calls, outputs, strict=True)
    ]
    try:
        torch.autograd.grad(value, _ends(value), retain_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()


def _noted(note: Callable[[Call, Tensor], None], call: Call, grad: Tensor | None) -> None:
    if grad is not None:
        note(call, grad)


def _ends(value: Tensor) -> list[Tensor]:
    """The tensors that the graph of `value` begins with: a backward pass to all of them goes through all of it."""
    ends, seen, left = [], set(), [value.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += (before for before, _ in node.next_functions)
            if hasattr(node, "variable"):
                ends.append(node.variable)
    return ends
