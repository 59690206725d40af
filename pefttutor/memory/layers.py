"""What one layer of a model keeps, by its type; a layer of unknown type is run alone on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pefttutor.memory.paper import FLOAT, Paper

if TYPE_CHECKING:
    from pefttutor.memory.tape import Tape
    from pefttutor.parts.network import Made

__all__ = ["RULES", "Bare", "Making", "plain_rule", "run_alone", "trains"]

_WIDTH = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


def trains(parameter: Any) -> bool:
    """Whether a layer's parameter trains; one that the layer doesn't have, such as a missing bias, doesn't.

    >>> trains(nn.Linear(2, 2).weight), trains(nn.Linear(2, 2, bias=False).bias)
    (True, False)
    """
    return isinstance(parameter, Tensor) and parameter.requires_grad


def _linear(tape: Tape, layer: Any, x: Paper, kind: str) -> Paper:
    out = layer.weight.shape[0]
    return tape.linear(x, out, kind, weight=trains(layer.weight), bias=trains(layer.bias))


def _conv1d(tape: Tape, layer: Any, x: Paper, kind: str) -> Paper:
    out = layer.weight.shape[1]  # GPT-2's layer stores (in, out)
    return tape.linear(x, out, kind, weight=trains(layer.weight), bias=trains(layer.bias))


def _conv2d(tape: Tape, layer: Any, x: Paper, kind: str) -> Paper:
    """A picture's patches, one a row. Keeps them also where only the bias trains."""
    learns = trains(layer.weight) or trains(layer.bias)
    return tape.linear(x, layer.weight.shape[0], kind, weight=learns)


def _embedding(tape: Tape, layer: Any, ids: Paper, kind: str) -> Paper:
    weight = layer.weight
    if trains(weight):
        tape.save(ids, kind)
    return Paper(ids.rows, weight.shape[1], weight.element_size(), trains(weight))


def _layer_norm(tape: Tape, layer: Any, x: Paper, kind: str) -> Paper:
    """Keeps x, and mean and 1/σ of each row."""
    grad = x.grad or trains(layer.weight) or trains(layer.bias)
    if grad:
        tape.save(x, kind)
        statistics = x.itemsize if tape.device == "cpu" else FLOAT
        tape.save(x.like(width=2, itemsize=statistics), kind)
    return x.like(grad=grad)


def _rms_norm(tape: Tape, layer: Any, x: Paper, kind: str, *, upcast: bool = True) -> Paper:
    """w · (h · ρ) with ρ = (mean h² + ε)^−½ in float32: keeps h, ρ, and h · ρ where w trains."""
    wide = tape.cast(x, FLOAT)
    root = wide.like(width=1)
    if x.grad:
        tape.save(wide, kind)  # for h²
        tape.save(root, kind)  # for the root itself
    product = tape.mul(wide if upcast else x, root, kind)
    weight = Paper(0, 0, x.itemsize, trains(layer.weight))  # a parameter costs nothing to keep
    return tape.mul(tape.cast(product, x.itemsize), weight, kind)


Rule = Callable[["Tape", Any, Paper, str], Paper]
_RMS: dict[str, Rule] = {f"{name}RMSNorm": _rms_norm for name in ("Llama", "Mistral", "Qwen2", "Qwen3")}
RULES: dict[str, Rule] = {
    "Linear": _linear,
    "Conv1D": _conv1d,
    "Conv2d": _conv2d,
    "Embedding": _embedding,
    "LayerNorm": _layer_norm,
    "T5LayerNorm": partial(_rms_norm, upcast=False),
    "MT5LayerNorm": partial(_rms_norm, upcast=False),
    **_RMS,
}


def plain_rule(layer: nn.Module) -> Rule | None:
    """The rule of the layer's type; None for an unknown type, or where a method has put more into the layer.

    >>> plain_rule(nn.Linear(2, 2)) is RULES["Linear"], plain_rule(nn.Tanh()) is None
    (True, True)
    """
    return RULES.get(type(layer).__name__) if {*layer._parameters} <= {"weight", "bias"} else None


class Bare(nn.Module):
    """What a module itself holds, what stands in the place of its parameters while it runs, and no layer of it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        vars(self).update(vars(module) | {"_modules": {}})

    def forward(self, x: Tensor) -> Tensor:
        return x


class Making(nn.Module):
    """What makes virtual tokens or a prefix of the parameters that train."""

    def __init__(self, part: Made) -> None:
        super().__init__()
        self.maker = part.maker
        for module, key in part.places.values():
            self.register_parameter(key, module.get_parameter(key))

    def extra_repr(self) -> str:
        return repr(self.maker)

    def forward(self, x: Tensor) -> Tensor:
        return self.maker(self)


def run_alone(tape: Tape, layer: nn.Module, x: Paper, kind: str) -> Paper:
    """Run a layer of unknown type by itself, without values, and see what autograd saves.

    For the layers of a method that says nothing about itself. The layer gets x as (rows, width), ids as (rows), and a
    convolution one patch a row. Of layers that look the same, one is run.

    >>> from pefttutor.memory.tape import Tape
    >>> tape = Tape()
    >>> _ = run_alone(tape, nn.Tanh(), Paper(rows=3, width=4, itemsize=4, grad=True), "ffn")
    >>> tape.bytes_by_kind()["ffn"]                                         # 3 · 4 results of 4 bytes
    48

    Raises: ValueError if it can't run without values.
    """
    looks = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    hooks = (*layer._forward_pre_hooks.values(), *layer._forward_hooks.values())
    key = (type(layer), str(layer), looks, hooks, x.rows, x.width, x.itemsize, x.grad)
    if key not in tape.alone:
        tape.alone[key] = (x, *_run(layer, x))
    first_input, saved, output = tape.alone[key]
    papers = {first_input: x}  # of the layer that was run, by those of this one
    for paper in saved:
        tape.save(papers.setdefault(paper, paper.like()), kind)
    return papers.get(output) or output.like()


def _run(layer: nn.Module, x: Paper) -> tuple[list[Paper], Paper]:
    """What autograd saves for the layer, each storage once, and its output."""
    if isinstance(layer, nn.Embedding):
        sample = torch.empty(x.rows, dtype=torch.int64, device="meta")
    else:
        shape = layer.weight.shape[1:] if isinstance(layer, nn.Conv2d) else (x.width,)
        sample = torch.empty(x.rows, *shape, dtype=_WIDTH[x.itemsize], device="meta", requires_grad=x.grad)
    exist = {p.untyped_storage()._cdata for p in [*layer.parameters(), *layer.buffers()]}
    seen: dict[int, Paper] = {sample.untyped_storage()._cdata: x}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in exist:
            alive.append(tensor.detach())  # so that no address is used twice
            size = storage.nbytes() // tensor.element_size()
            saved.append(seen.setdefault(storage._cdata, Paper(1, size, tensor.element_size(), True)))
        return tensor

    alive: list[Tensor] = []
    saved: list[Paper] = []
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y = layer.train()(sample)
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{type(layer).__name__} can't be run without values ({error}); give its method "
            "trace(layer, x, tape, kind), see pefttutor.method.Method"
        ) from error
    saved_too = seen.get(y.untyped_storage()._cdata)
    return saved, saved_too or Paper(x.rows, y.numel() // x.rows, y.element_size(), y.requires_grad)
