"""Share independent pieces of work among threads, each of which computes alone.

torch splits one operation over its threads. That costs some 50 µs of starting and joining, as much as a short
operation takes, and some operations (gathering, scattering) it doesn't split at all. Work made of many such operations
is done sooner when each thread takes whole pieces of it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from typing import Any, TypeVar

import torch

__all__ = ["alone", "plain", "share", "short_way"]

Piece = TypeVar("Piece")

_BY_THREAD = "parallel backend: OpenMP" in torch.__config__.parallel_info()  # each thread has its own count


def short_way(device: torch.device) -> bool:
    """Whether a kernel has nothing to gain here from threads and pieces, and gives each order once, for the whole.

    True for everything but a CPU. Another device works on an order while the next is given, as long as nobody asks
    for a value meanwhile: there a kernel also reads none back, and makes the fewest orders that it can.

    >>> short_way(torch.device("cpu")), short_way(torch.device("cuda"))
    (False, True)
    """
    return device.type != "cpu"


@cache
def _pool() -> ThreadPoolExecutor:
    """Has as many threads as were ever needed at a time."""
    return ThreadPoolExecutor(1024, "pefttutor", initializer=torch.set_num_threads, initargs=(1,))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads don't survive a fork


@contextmanager
def alone() -> Iterator[None]:
    """Within the block torch's operations use this thread only.

    A thread that begins to use torch at that time has one from then on: torch keeps the number for all new threads.

    >>> with alone():
    ...     torch.get_num_threads()
    1
    """
    threads = torch.get_num_threads()
    try:
        if _BY_THREAD:
            torch.set_num_threads(1)
        yield
    finally:
        if _BY_THREAD:
            torch.set_num_threads(threads)


@contextmanager
def plain(device: torch.device, *, inference: bool = False) -> Iterator[None]:
    """Within the block autograd records nothing and autocast is off: what each thread has switches of its own for.

    >>> with plain(torch.device("cpu")):
    ...     torch.is_grad_enabled()
    False
    """
    kind = device.type
    casting = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    with (
        torch.no_grad(),
        torch.inference_mode() if inference else nullcontext(),
        torch.autocast(kind, enabled=False) if casting else nullcontext(),
    ):
        yield


def share(work: Callable[[Piece], Any], pieces: Iterable[Piece], device: torch.device) -> None:
    """work(piece) for every piece, in any order, on as many threads as torch has (`torch.get_num_threads()`).

    No two pieces may write to the same entry. Autograd records nothing, autocast is off, and inference mode is as it
    is here. Starting costs about 0.1 ms. Where `short_way` says so this thread alone gives the orders.

    >>> done: list[int] = []
    >>> share(lambda piece: done.append(piece * piece), range(4), torch.device("cpu"))
    >>> sorted(done)
    [0, 1, 4, 9]

    Raises: what `work` raises, once all threads have stopped; pieces that weren't begun are dropped then.
    """
    left = deque(pieces)
    drain = partial(_drain, work, left, device, torch.is_inference_mode_enabled())
    if short_way(device) or not _BY_THREAD:
        drain()
        return
    helpers = min(torch.get_num_threads(), len(left)) - 1
    with alone():
        running = _started(drain, helpers)
        try:
            drain()
        finally:
            _stopped(running, left)
    for helper in running:
        helper.result()


def _started(drain: Callable[[], None], helpers: int) -> list[Future[None]]:
    running: list[Future[None]] = []
    with suppress(RuntimeError):  # Python is shutting down, and starts no thread any more
        for _ in range(helpers):
            running.append(_pool().submit(drain))
    return running


def _stopped(running: list[Future[None]], left: deque[Any]) -> None:
    try:
        wait(running)
    except BaseException:  # Ctrl-C: what is begun still writes
        left.clear()
        wait(running)
        raise


def _drain(work: Callable[[Piece], Any], left: deque[Piece], device: torch.device, inference: bool) -> None:
    with plain(device, inference=inference):
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
