"""FISH mask: its budget, the largest, and a mask that never changes."""

from __future__ import annotations

import pytest
import torch

from pefttutor import (
    FishMask,
    adapted,
    fit,
    load,
    save,
    trainable,
)
from pefttutor.parts.entries import masks
from pefttutor.parts.information import fisher_information
from tests.tiny import (
    class_examples,
    llama_classifier,
    weights,
)


def test_fish_keeps_to_its_budget_and_takes_the_largest():
    model = llama_classifier()
    everything = sum(p.numel() for p in model.parameters())
    method = FishMask(fraction=0.05, modules_to_save=("score",))
    information = fisher_information(model, class_examples(12))
    method.attach(model, class_examples(12))
    assert sum(trainable(model).values()) == int(0.05 * everything)
    chosen = masks(model)
    assert chosen["score.weight"].all()
    inside = torch.cat([information[n][m] for n, m in chosen.items() if "score" not in n])
    outside = torch.cat([information[n][~m] for n, m in chosen.items()])
    assert inside.min() >= outside.max()


def test_the_mask_of_fish_never_changes_and_is_saved(tmp_path):
    model, before = llama_classifier(), weights(llama_classifier())
    FishMask(fraction=0.05, samples=6, modules_to_save=("score",)).attach(model, class_examples(24))
    chosen = masks(model)
    fit(model, class_examples(), steps=5, lr=0.05, weight_decay=0.5)
    for name, old in before.items():
        new = dict(model.named_parameters())[name]
        assert torch.equal(new[~chosen[name]], old[~chosen[name]])
    save(model, tmp_path)
    again = load(llama_classifier(), tmp_path)  # without examples
    assert all(torch.equal(m, chosen[name]) for name, m in masks(again).items())
    assert weights(again).keys() == weights(model).keys()
    assert all(torch.equal(weights(again)[name], value) for name, value in weights(model).items())


def test_a_model_with_nan_is_refused():
    model = llama_classifier()
    model.score.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN"):
        FishMask(fraction=0.1, modules_to_save=("score",)).attach(model, class_examples(4))
    assert adapted(model) is None


def test_fish_says_what_it_needs():
    with pytest.raises(ValueError, match="chooses by data"):
        FishMask(modules_to_save=("score",), fraction=0.1).attach(llama_classifier())
    with pytest.raises(ValueError, match="take at least"):
        FishMask(modules_to_save=("score",), fraction=0.0001).attach(llama_classifier(), class_examples())
    with pytest.raises(ValueError, match="samples is 0"):
        FishMask(samples=0)
