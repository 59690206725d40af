"""LastLayers: how many blocks, and what is refused."""

from __future__ import annotations

import pytest
from torch import nn

from pefttutor import (
    LastLayers,
    trainable,
)
from pefttutor.parts.blocks import blocks


def test_the_last_quarter_is_rounded_up(kind, tiny):
    model = tiny(kind)
    name, stack = blocks(model)
    LastLayers(fraction=0.3).attach(model)
    inside = {n for n, _ in model.named_parameters() if n.startswith(f"{name}.{len(stack) - 1}.")}
    assert set(trainable(model)) == inside
    assert LastLayers(fraction=0.3).count(tiny(kind)) == sum(trainable(model).values())


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="no list of blocks"):
        LastLayers().attach(nn.Linear(2, 2))
