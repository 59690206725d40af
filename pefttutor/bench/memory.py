"""Bytes of one step: its peak, what autograd keeps, what an optimizer holds, and resident memory in a process of
its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pefttutor.memory.allocator import transient_bytes

__all__ = ["kept_bytes", "peak_bytes", "resident_growth", "state_bytes"]


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """The most bytes that lived on the device during a step and did not before it. The step runs once beforehand.

    On a CPU see `transient_bytes`; on a GPU CUDA's allocator counts, scratch space of the matrix library included.
    """
    if device == "cpu":
        return transient_bytes(step)
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def kept_bytes(step: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward pass, by its saved-tensor hooks.

    >>> x = torch.ones(4, requires_grad=True)
    >>> kept_bytes(lambda: x.exp())                                     # its result, four float32
    16

    Every storage counts once, however many operations keep it. Parameters and their views don't count: they
    exist without the step.
    """
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        owner = tensor if tensor._base is None else tensor._base
        if not isinstance(owner, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor.detach())  # so that no address is used twice
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(storages.values())


def state_bytes(step: Callable[[], Any]) -> int:
    """Bytes of the tensors that `step.optimizer` has in its state after a step.

    Each storage counts once and in full. Scalars, such as the number of steps, don't: no entry has one of its own.

    >>> weight = torch.nn.Parameter(torch.ones(10))
    >>> def step(): weight.sum().backward(); step.optimizer.step()
    >>> step.optimizer = torch.optim.AdamW([weight])
    >>> state_bytes(step)                                               # two moments of ten float32
    80

    Raises: ValueError for a step that has no `optimizer`, or whose optimizer keeps nothing.
    """
    optimizer = getattr(step, "optimizer", None)
    if optimizer is None:
        raise ValueError(f"state_bytes: {step!r} has no attribute `optimizer`; set it to what the step steps")
    step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.dim()}
    if not storages:
        raise ValueError(f"state_bytes: {type(optimizer).__name__} has no tensor in its state after a step")
    return sum(storages.values())


def resident_growth(name: str, side: str, seed: int) -> int:
    """`resident_growth_here` of one side of a row, in a process of its own that holds nothing else."""
    code = (
        "import json, sys; from pefttutor.memory.allocator import resident_growth_here as measure;"
        "from pefttutor.bench.row import discover; name, side, seed = json.loads(sys.argv[1]);"
        "print(measure(discover()[name].build(side, seed, 'cpu')))"
    )
    command = [sys.executable, "-c", code, json.dumps([name, side, seed])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"resident memory of {name}/{side} wasn't measured: {done.stderr.strip()[-500:]}")
    return int(done.stdout.split()[-1])
