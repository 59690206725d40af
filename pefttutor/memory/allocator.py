"""What the allocator and the operating system say of a step's memory."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["resident_growth_here", "transient_bytes"]


def transient_bytes(step: Callable[[], Any]) -> int:
    """Peak of the bytes that live during the step and did not before it, as PyTorch's allocator reports them.

    Counts every tensor, whether autograd keeps it or an operation only passes through it; scratch space that
    a matrix library takes for itself is not counted, nor what a helper thread of `kernels.threads` allocates: where
    that is large, measure with one thread. The step runs once beforehand, outside the count.
    """
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # else torch's profiler tells stderr when it starts and stops
    step()
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    # There is one cycle only; asked to keep all cycles' events, torch 2.11 doesn't warn that it drops earlier ones.
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
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


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
