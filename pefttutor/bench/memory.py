"""Bytes of one step: the allocator's events, what autograd keeps, and resident memory."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["kept_bytes", "resident_growth", "resident_growth_here", "state_bytes", "transient_bytes"]


def transient_bytes(step: Callable[[], Any]) -> int:
    """Peak of the bytes that live during the step and did not before it, as PyTorch's allocator reports them.

    Counts every tensor, whether autograd keeps it or an operation only passes through it; scratch space that
    a matrix library takes for itself is not counted, nor what a helper thread of `kernels.threads` allocates: where
    that is large, measure with one thread. The step runs once beforehand, outside the count.
    """
    step()
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = step()
        del result
    kineto = profiler.profiler
    assert kineto is not None
    assert kineto.kineto_results is not None
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()  # negative when memory is given back
        peak = max(peak, live)
    return peak


def kept_bytes(step: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward pass, by its saved-tensor hooks.

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


def resident_growth_here(step: Callable[[], Any], steps: int = 3) -> int:
    """Growth of this process's resident memory over its level before the first step, at its highest (Linux).

    Raises: RuntimeError where the system doesn't offer /proc/self/clear_refs.
    """
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        raise RuntimeError("resident memory is read from /proc/self, which this system doesn't have")
    gc.collect()
    clear.write_text("5")  # resets the high-water mark
    before = _status_bytes("VmRSS")
    for _ in range(steps):
        step()
    return _status_bytes("VmHWM") - before


def resident_growth(name: str, side: str, seed: int) -> int:
    """`resident_growth_here` of one side of a row, in a process of its own that holds nothing else."""
    code = (
        "import json, sys; from pefttutor.bench.memory import resident_growth_here as measure;"
        "from pefttutor.bench.row import discover; name, side, seed = json.loads(sys.argv[1]);"
        "print(measure(discover()[name].build(side, seed)))"
    )
    command = [sys.executable, "-c", code, json.dumps([name, side, seed])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"resident memory of {name}/{side} wasn't measured: {done.stderr.strip()[-500:]}")
    return int(done.stdout.split()[-1])


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
