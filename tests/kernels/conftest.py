"""How many threads torch has, which the kernels share their work among."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def threads(request):
    """Set torch's number of threads for a test: pytest.mark.parametrize("threads", [1, 3], indirect=True)."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
