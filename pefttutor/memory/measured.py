"""What a training step really needed: what autograd kept, by layer; the allocator's peak; the process's growth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from pefttutor.memory.allocator import resident_growth_here, transient_bytes
from pefttutor.memory.weights import added_buffers

__all__ = ["Measured", "Saved", "measure", "watch_saved"]


@dataclass
class Saved:
    """What autograd kept: the bytes at the fullest moment, and by layer what the forward pass kept.

    >>> Saved()
    Saved(peak_bytes=0, by_layer=Counter())
    """

    peak_bytes: int = 0
    by_layer: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Measured:
    """What a step needed, in bytes, as `measure` returns it.

    >>> Measured(32, 32, 64, activations=60, by_layer={"0": 60}, allocator_peak=72, resident_growth=None).by_layer
    {'0': 60}

    weights, gradients, optimizer: what `model` and `optimizer` hold after the step (0 without them). Weights are the
        parameters, and the buffers that a method has added.
    activations: what autograd kept at the fullest moment; each storage counts once, and weights don't count.
    by_layer: the same by the module that made autograd keep it.
    allocator_peak: all that lived during the step and not before it, so also what operations only passed through.
    resident_growth: by how much the process grew; None where that can't be measured.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    by_layer: dict[str, int]
    allocator_peak: int
    resident_growth: int | None


def measure(
    step: Callable[[], Any], *, model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None
) -> Measured:
    """Run `step()`, a forward and a backward pass, and say what it needed.

        measure(lambda: model(**batch).loss.backward(), model=model)

    >>> model, x = nn.Sequential(nn.Linear(3, 2)), torch.ones(5, 3)
    >>> measure(lambda: model(x).sum().backward(), model=model).activations         # x: 5 · 3 values of 4 bytes
    60

    It is called six times: the saved tensors, the allocator and resident memory are watched one after the other, and
    each warms up. Gradients are left as the last call leaves them.

    Raises: ValueError as `watch_saved` does; what `step` raises.
    """
    with watch_saved(model) as saved:
        step()
    parameters = list(model.parameters()) if model is not None else []
    state = [t for entry in optimizer.state.values() for t in entry.values()] if optimizer is not None else []
    moments = [t for t in state if isinstance(t, Tensor) and t.dim()]  # the count of steps is no moment
    return Measured(
        weights=_nbytes(parameters) + (_nbytes(added_buffers(model)) if model is not None else 0),
        gradients=_nbytes(p.grad for p in parameters),
        optimizer=_nbytes(moments),
        activations=saved.peak_bytes,
        by_layer=dict(saved.by_layer),
        allocator_peak=_allocator_peak(step),
        resident_growth=_resident_growth(step),
    )


@contextmanager
def watch_saved(model: nn.Module | None = None) -> Iterator[Saved]:
    """Inside the block, note what autograd keeps and when it lets go; with `model` by the names of its layers.

    >>> model, x = nn.Sequential(nn.Linear(3, 2)), torch.ones(5, 3)
    >>> with watch_saved(model) as saved: y = model(x)
    >>> saved.by_layer                                                              # x: 5 · 3 values of 4 bytes
    Counter({'0': 60})

    Every storage counts once, however many operations keep it, for as long as one of them does. Parameters and their
    views don't count, nor do the buffers of `model`, because they exist without the step. What `torch.utils.checkpoint`
    keeps is seen with use_reentrant=True only; the other kind keeps its inputs where nobody can look.

    Raises: ValueError if `model` uses that other kind, which is transformers' usual one.
    """
    _refuse_hidden_checkpoints(model)
    exist = {b.untyped_storage()._cdata for b in model.buffers()} if model is not None else set()
    saved, live, inside = Saved(), Counter[int](), _Inside(model)
    sizes: dict[int, int] = {}
    total = 0

    class Kept:
        """In the place of a saved tensor: when the graph drops it, so do we."""

        def __init__(self, tensor: Tensor) -> None:
            nonlocal total
            self.tensor, storage = tensor, tensor.untyped_storage()
            self.key = storage._cdata
            if not live[self.key]:
                sizes[self.key] = storage.nbytes()
                total += sizes[self.key]
                if torch._C._current_graph_task_id() == -1:  # not in a backward pass
                    saved.by_layer[inside.name] += sizes[self.key]
                saved.peak_bytes = max(saved.peak_bytes, total)
            live[self.key] += 1

        def __del__(self) -> None:
            nonlocal total
            live[self.key] -= 1
            if not live[self.key]:
                total -= sizes[self.key]

    def pack(tensor: Tensor) -> Any:
        owner = tensor if tensor._base is None else tensor._base
        exists = isinstance(owner, nn.Parameter) or tensor.untyped_storage()._cdata in exist
        return tensor if exists else Kept(tensor)

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed.tensor

    with inside, torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield saved


def _refuse_hidden_checkpoints(model: nn.Module | None) -> None:
    for module in model.modules() if model is not None else ():
        chosen = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(module, "gradient_checkpointing", False) and not chosen.get("use_reentrant"):
            # The switch has had its name since transformers 5.23.
            named = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
            raise ValueError(
                "this model's gradient checkpointing keeps its inputs where they can't be measured. Call "
                f"model.{named}_checkpointing_enable({{'use_reentrant': True}}): that one can be seen"
            )


class _Inside:
    """Which layer of the model is running: the innermost one that has a name."""

    def __init__(self, model: nn.Module | None) -> None:
        self.names = {module: name for name, module in model.named_modules()} if model is not None else {}
        self.stack = [""]

    @property
    def name(self) -> str:
        return self.stack[-1]

    def __enter__(self) -> None:
        def enter(module: nn.Module, args: Any) -> None:
            self.stack.append(self.names.get(module, self.name))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.stack.pop()

        self.handles = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        ]

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()


def _nbytes(tensors: Any) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


def _allocator_peak(step: Callable[[], Any]) -> int:
    if not torch.cuda.is_available():
        return transient_bytes(step)
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _resident_growth(step: Callable[[], Any]) -> int | None:
    try:
        return resident_growth_here(step)
    except (RuntimeError, OSError):
        return None
