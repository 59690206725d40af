"""LinearProbe: the head alone, and nothing without one."""

from __future__ import annotations

import pytest
from torch import nn

from pefttutor import (
    LinearProbe,
    fit,
    save,
)
from tests.pictures import differences
from tests.tiny import (
    class_examples,
    llama,
    llama_classifier,
    weights,
)


def test_the_head_alone_changes_and_is_all_that_is_saved(tmp_path):
    model = LinearProbe(modules_to_save=("score",)).attach(llama_classifier())
    before = weights(model)
    fit(model, class_examples(), steps=3, lr=0.05, weight_decay=0.5)
    assert differences(before, weights(model)) == ["score.weight"]
    from safetensors import safe_open

    with safe_open(save(model, tmp_path) / "adapter.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["score.weight"]


def test_without_a_head_there_is_nothing_to_train():
    with pytest.raises(ValueError, match="modules_to_save is empty; name the head"):
        LinearProbe(modules_to_save=()).attach(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="modules_to_save: this model has no 'classifier'"):
        LinearProbe().attach(llama())
