"""Choosing by data leaves the model as it was, and a choice that fails leaves the old one."""

from __future__ import annotations

import copy

import pytest
import torch

from pefttutor import DiffPruning, FishDip, SecondOrderMask, adapted, fit, trainable
from pefttutor.data.evaluation import evaluate
from pefttutor.parts.attachment import base_of
from pefttutor.parts.entries import entries, masks
from pefttutor.parts.information import example_losses as losses
from pefttutor.parts.information import total_gradient
from tests.tiny import class_examples, llama_classifier


@pytest.mark.parametrize("measure", [losses, total_gradient, evaluate])
def test_each_module_keeps_its_own_mode(measure):
    model = llama_classifier().train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    measure(model, class_examples(4))
    assert [m.training for m in model.modules()] == before
    with pytest.raises(Exception):  # noqa: B017, PT011
        measure(model, [{"input_ids": torch.tensor([5000]), "labels": torch.tensor(0)}])
    assert [m.training for m in model.modules()] == before


def without_labels():
    return [{k: v for k, v in e.items() if k != "labels"} for e in class_examples(4)]


@pytest.mark.parametrize("method", [FishDip(), SecondOrderMask(), SecondOrderMask(damping=0.1)])
def test_without_labels_it_says_so(method):
    model = llama_classifier()
    with pytest.raises(ValueError, match="needs labels, and an example has only input_ids"):
        method.attach(model, without_labels())
    assert adapted(model) is None


def overflowing(model):
    """Something that makes the Fisher information of the model NaN."""
    model.score.weight.data[0, 0] = float("nan")
    return class_examples(12)


@pytest.mark.parametrize("bad", [lambda model: [], lambda model: without_labels(), overflowing])
def test_a_refresh_that_fails_leaves_the_choice_as_it_was(bad):
    model, examples = llama_classifier(), class_examples(12)
    method = FishDip(fraction=0.02, modules_to_save=("score",))
    method.attach(model, examples)
    fit(model, examples, steps=2, lr=0.02)
    before, trains, described = masks(model), trainable(model), base_of(model, without=())
    with pytest.raises((ValueError, FloatingPointError)):
        method.refresh(model, bad(model))
    assert adapted(model) is method
    assert trainable(model) == trains
    assert base_of(model, without=()) == described
    assert all(torch.equal(mask, before[name]) for name, mask in masks(model).items())


def test_refreshing_leaves_no_hooks_behind():
    model, examples = llama_classifier(), class_examples(12)
    method = FishDip(fraction=0.02)
    method.attach(model, examples)

    def hooks():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    embedding = model.model.embed_tokens
    count = len(embedding._forward_hooks)
    for _ in range(3):
        method.refresh(model, examples)
    assert len(embedding._forward_hooks) == count
    assert len(copy.deepcopy(model).model.embed_tokens._forward_hooks) == count
    assert max(max(pair) for pair in hooks()) <= 2


def test_projecting_takes_the_usual_gates_whatever_the_mode():
    model = llama_classifier()
    method = DiffPruning(alpha_init=0.0)
    method.attach(model)
    fit(model, class_examples(), steps=3, lr=0.02)
    one, two = copy.deepcopy(model).eval(), copy.deepcopy(model).train()
    for each in (one, two):
        method.project(each, fraction=0.05)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert all(torch.equal(i, entries(two)[name]) for name, i in entries(one).items())
