"""A GPU's way through the kernels, taken on a CPU by force, and a watch over what would make a GPU wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pefttutor.kernels import threads

aten = torch.ops.aten
# Their result, or its shape, depends on values: the program waits until the device has come there.
ASKING = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.nonzero_numpy, aten.argwhere,
    aten.masked_select, aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount,
    aten.histc, aten.repeat_interleave, aten.allclose,
}  # fmt: skip
FACTORIES = {
    torch.empty, torch.zeros, torch.ones, torch.full, torch.arange, torch.linspace, torch.tensor, torch.rand,
    torch.randn, torch.randint, torch.randperm, torch.eye, torch.as_tensor, torch.scalar_tensor, torch.empty_strided,
}  # fmt: skip


class _Questions(TorchDispatchMode):
    """Counts the operations that a GPU would have to answer."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        if func.overloadpacket in ASKING or by_mask:
            self.asked.append(str(func))
        return func(*args, **(kwargs or {}))


class _Devices(TorchFunctionMode):
    """Refuses a tensor that is made without saying where, and counts the lists that are made of tensors."""

    def __init__(self, asked: list[str]) -> None:
        super().__init__()
        self.asked = asked

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in FACTORIES or "device" in (kwargs or {}), f"{func.__name__} without a device"
        if func in (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy):
            self.asked.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def watching() -> Iterator[list[str]]:
    with _Questions() as questions, _Devices(questions.asked):
        yield questions.asked


@pytest.fixture
def watched() -> Callable[[], object]:
    """`with watched() as asked:` notes what would make a GPU wait, and refuses tensors made without a device."""
    return watching


@pytest.fixture
def short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels do on the CPU what they do on a GPU."""
    monkeypatch.setattr(threads, "short_way", lambda device: True)


@pytest.fixture(params=["threads", "short way"])
def way(request: pytest.FixtureRequest) -> str:
    """The CPU's way, and then a GPU's."""
    if request.param == "short way":
        request.getfixturevalue("short_way")
    return request.param
