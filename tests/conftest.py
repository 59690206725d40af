"""The fixtures of all tests: the tiny models and batches of tests/tiny.py, and torch's threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing is downloaded
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import KINDS, TARGETS, redraw_factors, tiny_batch, tiny_model


@pytest.fixture
def tiny() -> Callable[..., nn.Module]:
    """`tiny(kind, seed=0, dtype=torch.float32, **config)`: see `tiny_model`."""
    return tiny_model


@pytest.fixture
def batch() -> Callable[..., dict[str, Tensor]]:
    """`batch(kind, side="right", dtype=torch.float32)`: see `tiny_batch`."""
    return tiny_batch


@pytest.fixture
def redraw() -> Callable[..., nn.Module]:
    """`redraw(model, seed=1, std=0.2)`: see `redraw_factors`."""
    return redraw_factors


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Every architecture of transformers in turn."""
    return request.param


@pytest.fixture
def targets(kind: str) -> tuple[str, ...]:
    """What is usually adapted in a model of this kind."""
    return TARGETS[kind]


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, until the test's end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def threads(request: pytest.FixtureRequest, set_threads: Callable[[int], None]) -> int:
    """Set torch's number of threads for a test: pytest.mark.parametrize("threads", [1, 3], indirect=True)."""
    set_threads(request.param)
    return request.param
