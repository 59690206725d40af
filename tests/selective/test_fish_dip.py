"""Fish-Dip: a FISH mask by the hardest examples, chosen again and again."""

from __future__ import annotations

import pytest
import torch

from pefttutor import (
    FishDip,
    FishMask,
    fit,
    trainable,
)
from pefttutor.parts.entries import masks
from pefttutor.parts.information import example_losses as losses
from tests.tiny import (
    base_weights,
    class_examples,
    llama_classifier,
    same,
)


def test_with_all_examples_and_no_refresh_fish_dip_is_fish():
    examples = class_examples(12)
    dip = FishDip(fraction=0.05, hardest=12, share=1).masks(llama_classifier(), examples)
    fish = FishMask(fraction=0.05).masks(llama_classifier(), examples)
    assert all(torch.equal(dip[name], fish[name]) for name in fish)


def test_a_refresh_follows_the_hardest_examples_and_keeps_what_was_learnt():
    model, examples = llama_classifier(), class_examples(40)
    method = FishDip(fraction=0.02)
    method.attach(model, examples)
    first = masks(model)
    fit(model, examples, steps=6, lr=0.05, weight_decay=0.1)
    learnt = base_weights(model)
    order = losses(model, examples).argsort(descending=True)[:4]  # 10 % of 40
    method.refresh(model, examples)
    assert same(base_weights(model), learnt)
    second = masks(model)
    assert any(not torch.equal(first[n], second[n]) for n in first)
    expected = FishMask(fraction=0.02).masks(model_of(learnt), [examples[int(i)] for i in order])
    assert all(torch.equal(second[name], expected[name]) for name in expected)
    assert sum(trainable(model).values()) == sum(int(m.sum()) for m in first.values())
    fit(model, examples, steps=2, lr=0.05, weight_decay=0.5)
    after = base_weights(model)
    assert all(torch.equal(after[n][~second[n]], learnt[n][~second[n]]) for n in after)
    with pytest.raises(RuntimeError, match="needs one FishDip"):
        method.refresh(llama_classifier(), examples)


def model_of(values):
    model = llama_classifier()
    model.load_state_dict(values, strict=False)
    return model


@pytest.mark.parametrize("hardest", [-1, 0, 2.5])
def test_hardest_is_a_count(hardest):
    with pytest.raises(ValueError, match="hardest is"):
        FishDip(hardest=hardest)
