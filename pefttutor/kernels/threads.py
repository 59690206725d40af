"""Share independent pieces of work among threads, each of which computes alone.

torch splits one operation over its threads. That costs some 50 µs of starting and joining, as much as a short
operation takes, and some operations (gathering, scattering) it doesn't split at all. Work made of many such operations
is done sooner when each thread takes whole pieces of it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, TypeVar

import torch

__all__ = ["alone", "share"]

Piece = TypeVar("Piece")

_BY_THREAD = "parallel backend: OpenMP" in torch.__config__.parallel_info()  # each thread has its own count


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "pefttutor", initializer=torch.set_num_threads, initargs=(1,))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads don't survive a fork


@contextmanager
def alone() -> Iterator[None]:
    """Within the block torch's operations use this thread only."""
    threads = torch.get_num_threads()
    if not _BY_THREAD or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def share(work: Callable[[Piece], Any], pieces: Iterable[Piece], device: torch.device) -> None:
    """work(piece) for every piece, in any order, on as many threads as torch has (`torch.get_num_threads()`).

    No two pieces may write to the same entry. Nothing is recorded for autograd, and autocast is off. Starting costs
    about 0.1 ms. On another device than the CPU this thread alone gives the orders.

    Raises: what `work` raises, once all threads have stopped; pieces that weren't begun are dropped then.
    """
    left = deque(pieces)
    if device.type != "cpu" or not _BY_THREAD:
        _drain(work, left, device)
        return
    helpers = min(torch.get_num_threads(), len(left)) - 1
    with alone():
        running = [_pool().submit(_drain, work, left, device) for _ in range(helpers)]
        try:
            _drain(work, left, device)
        finally:
            wait(running)
    for helper in running:
        helper.result()


def _drain(work: Callable[[Piece], Any], left: deque[Piece], device: torch.device) -> None:
    kind = device.type  # each thread has its own switches
    casting = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    with torch.no_grad(), torch.autocast(kind, enabled=False) if casting else nullcontext():
        while True:
            try:
                piece = left.popleft()
            except IndexError:  # asking first would leave time for another thread to take the last one
                return
            try:
                work(piece)
            except BaseException:
                left.clear()
                raise
