"""Work shared among threads: all of it, at the same time, each thread alone, and everything as before afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from pefttutor.kernels import threads as kernel
from pefttutor.kernels.threads import alone, share

CPU = torch.device("cpu")
THREE = pytest.mark.parametrize("threads", [3], indirect=True)


def seen_by_a_new_thread():
    """The number of torch's threads that a thread started now would use."""
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_every_piece_is_worked_on_once(threads, count):
    done = []
    share(done.append, range(count), CPU)
    assert sorted(done) == list(range(count))


@THREE
def test_as_many_pieces_at_a_time_as_torch_has_threads(threads):
    together, names = threading.Barrier(3), set()

    def work(piece):
        together.wait(timeout=60)  # breaks unless three are here at the same time
        names.add(threading.get_ident())

    share(work, range(6), CPU)
    assert len(names) == 3


@THREE
def test_a_gpus_orders_are_given_by_this_thread_alone(threads, short_way):
    seen = []

    def work(piece):
        threading.Event().wait(0.01)  # time enough for another thread to take the next one
        seen.append((piece, threading.get_ident(), torch.is_grad_enabled()))

    share(work, range(9), CPU)
    assert seen == [(piece, threading.get_ident(), False) for piece in range(9)]


@THREE
def test_each_thread_computes_alone_and_records_nothing(threads):
    together, seen = threading.Barrier(3), []

    def work(piece):
        together.wait(timeout=60)
        seen.append((torch.get_num_threads(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

    with torch.autocast("cpu", torch.bfloat16):
        share(work, range(3), CPU)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [(1, False, False)] * 3
    assert torch.is_grad_enabled()
    assert torch.get_num_threads() == seen_by_a_new_thread() == 3


@THREE
def test_an_error_comes_out_after_all_threads_have_stopped(threads):
    together, done = threading.Barrier(3), []

    def work(piece):
        if piece < 3:
            together.wait(timeout=60)
        if piece == 1:
            raise ValueError("piece 1")
        threading.Event().wait(0.2 if piece == 2 else 0.01)
        done.append(piece)

    with pytest.raises(ValueError, match="piece 1"):
        share(work, range(1000), CPU)
    assert 2 in done
    assert len(done) < 999
    assert torch.get_num_threads() == 3
    share(done.append, [-1], CPU)
    assert done[-1] == -1


@THREE
def test_ctrl_c_while_waiting_waits_for_what_is_begun(threads, monkeypatch):
    """What is begun still writes: nobody may think it over."""
    begun, done, real = threading.Barrier(3), [], kernel.wait
    interrupts = iter([KeyboardInterrupt])

    def wait(running):
        if error := next(interrupts, None):
            raise error
        real(running)

    def work(piece):
        begun.wait(timeout=60)
        if threading.current_thread() is not threading.main_thread():
            threading.Event().wait(0.3)
        done.append(piece)

    monkeypatch.setattr(kernel, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        share(work, range(3), CPU)
    assert sorted(done) == [0, 1, 2]
    assert torch.get_num_threads() == 3


@THREE
@pytest.mark.parametrize("inference", [False, True])
def test_inference_mode_is_everybodys(threads, inference):
    """A helper could not write in place to a tensor of inference mode otherwise."""
    together, seen = threading.Barrier(3), []

    def work(row):
        together.wait(timeout=60)
        row += 1
        seen.append(torch.is_inference_mode_enabled())

    with torch.inference_mode(inference):
        rows = torch.zeros(3, 2)
        share(work, rows.unbind(), CPU)
    assert seen == [inference] * 3
    assert rows.eq(1).all()


def test_a_thread_that_outlives_the_program_works_alone():
    """Python starts no thread while it shuts down."""
    code = """
import threading, torch
from pefttutor.kernels.threads import share
torch.set_num_threads(3)
def late():
    threading.main_thread().join()
    share(print, "abc", torch.device("cpu"))
threading.Thread(target=late).start()
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert sorted(run.stdout.split()) == ["a", "b", "c"], run.stderr


@THREE
def test_shared_work_may_share_its_own(threads):
    done = []
    share(lambda piece: share(done.append, [piece, piece], CPU), range(10), CPU)
    assert sorted(done) == sorted([*range(10), *range(10)])


@THREE
def test_alone_is_undone_by_an_error_too(threads):
    def fail():
        with alone():
            seen.append(torch.get_num_threads())
            raise KeyError

    seen = []
    with pytest.raises(KeyError):
        fail()
    assert seen == [1]
    assert torch.get_num_threads() == seen_by_a_new_thread() == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows doesn't fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@THREE
def test_a_forked_process_has_threads_of_its_own(threads):
    """The threads that waited in the parent don't exist in the child, where nobody would do their part."""
    together = threading.Barrier(3)
    share(lambda piece: together.wait(timeout=60), range(3), CPU)
    child = os.fork()
    if not child:
        again = threading.Barrier(3)
        threading.Timer(60, os._exit, [1]).start()
        share(lambda piece: again.wait(timeout=30), range(3), CPU)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
