"""Which methods exist: their names, and the shape of each."""

from __future__ import annotations

import pefttutor
from pefttutor.method import Method


def test_every_method_is_a_frozen_dataclass_that_can_be_made_without_arguments():
    for name, method in pefttutor.methods().items():
        assert method.__name__ == name
        assert isinstance(method(), Method)
        assert method.__dataclass_params__.frozen
        assert hash(method()) == hash(method())
