"""Entries chosen anew in an attachment: alone, beside others, switched off, and when it fails."""

from __future__ import annotations

import copy

import pytest
import torch

from pefttutor import (
    LTSFT,
    DiffPruning,
    FishDip,
    LoRA,
    adapted,
    attached,
    detach,
    fit,
    save,
    switch,
    trainable,
)
from pefttutor.method import find
from pefttutor.parts.attachment import base_of
from pefttutor.parts.entries import entries, masks
from tests.cases import answer, moved
from tests.pictures import differences, picture, tensors
from tests.tiny import class_examples, llama_classifier

IDS = {"input_ids": torch.tensor([[1, 7, 8, 9], [1, 20, 30, 5]])}
HEAD = ("score",)


def with_lora(attach, *arguments, **how) -> torch.nn.Module:
    """A classifier with a LoRA that has learned, and the method beside it, which has learned too."""
    model = moved(LoRA(r=2).attach(llama_classifier(), name="lora"))
    attach(model, *arguments, name="chosen", **how)
    return moved(model, seed=3)


def lora_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors(model).items() if "lora_" in name}


# ---- beside another method


def test_a_refresh_beside_a_lora_chooses_for_both_and_touches_only_its_own():
    examples, method = class_examples(12), FishDip(fraction=0.02, modules_to_save=HEAD)
    model = with_lora(method.attach, examples)
    expected, factors, trained = answer(model, IDS), lora_of(model), sum(trainable(model).values())
    first = entries(model)
    method.refresh(model, examples)
    assert torch.equal(answer(model, IDS), expected)
    assert differences(factors, lora_of(model)) == []
    second = entries(model)
    assert any(name not in first or not torch.equal(index, first[name]) for name, index in second.items())
    assert not any("lora" in name for name in second)
    assert sum(trainable(model).values()) == trained
    fit(model, examples, steps=1, lr=0.05)
    assert set(differences(factors, lora_of(model))) == set(factors)
    detach(model)
    assert differences(tensors(llama_classifier()), tensors(model)) == []


def test_projecting_beside_a_lora_keeps_what_all_entries_had_learned():
    method = DiffPruning(modules_to_save=HEAD)
    model = with_lora(method.attach)
    expected, factors = answer(model, IDS), lora_of(model)
    method.project(model, fraction=1)
    torch.testing.assert_close(answer(model, IDS), expected, rtol=1e-5, atol=1e-5)
    assert differences(factors, lora_of(model)) == []
    assert not any(name.endswith(("_alpha@chosen", "_delta@chosen")) for name in trainable(model))
    with pytest.raises(RuntimeError, match="this model has 0 such attachments"):
        method.project(model)
    detach(model, "chosen")
    alone = LoRA(r=2).attach(llama_classifier(), name="lora")
    for name, factor in factors.items():
        alone.get_parameter(name).data.copy_(factor)
    assert differences(tensors(alone), tensors(model)) == []
    assert torch.equal(answer(model, IDS), answer(alone, IDS))


def test_rewinding_beside_a_lora_rewinds_the_base_alone():
    method = LTSFT(fraction=0.1)
    model = with_lora(method.attach)
    factors = lora_of(model)
    method.rewind(model)
    assert differences(factors, lora_of(model)) == []
    base, now = tensors(llama_classifier()), tensors(model)
    assert differences(base, {name: tensor for name, tensor in now.items() if name in base}) == []
    n = sum(p.numel() for p in llama_classifier().parameters())
    assert sum(map(len, entries(model).values())) == int(0.1 * n)
    fit(model, class_examples(6), steps=1, lr=0.05)
    detach(model, "lora")
    assert list(attached(model)) == ["chosen"]
    detach(model)
    assert differences(base, tensors(model)) == []


# ---- among several


def two_dips(examples) -> torch.nn.Module:
    model = FishDip(fraction=0.02).attach(llama_classifier(), examples, name="one")
    FishDip(fraction=0.03).attach(switch(moved(model)), examples, name="two")
    return moved(model, seed=4)


def test_of_two_it_is_said_which_one_and_the_other_keeps_what_it_knows():
    examples = class_examples(12)
    model = two_dips(examples)
    one = answer(switch(copy.deepcopy(model), "one"), IDS)
    with pytest.raises(RuntimeError, match=r"refresh needs one FishDip attached"):
        adapted(model, "two").refresh(model, examples)
    expected = answer(model, IDS)
    adapted(model, "two").refresh(model, examples, name="two")
    assert torch.equal(answer(model, IDS), expected)
    assert torch.equal(answer(switch(model, "one"), IDS), one)
    torch.testing.assert_close(answer(switch(model, "two"), IDS), expected, rtol=0, atol=0)
    assert differences(tensors(llama_classifier()), tensors(detach(model))) == []


@pytest.mark.parametrize("name", ["one", "nobody"])
def test_a_name_of_none_is_told(name):
    model = LTSFT().attach(llama_classifier(), name="two")
    with pytest.raises(RuntimeError, match="rewind needs phase 1 before it"):
        LTSFT().rewind(model, name=name)
    with pytest.raises(RuntimeError, match="project needs DiffPruning attached"):
        DiffPruning().project(model, name=name)
    with pytest.raises(RuntimeError, match="refresh needs one FishDip"):
        FishDip().refresh(model, class_examples(4), name=name)


# ---- switched off


def dip(model, examples):
    return FishDip(fraction=0.02).attach(model, examples)


@pytest.mark.parametrize(
    ("attach", "again"),
    [
        (dip, lambda method, model, examples: method.refresh(model, examples)),
        (lambda model, examples: DiffPruning().attach(model),
         lambda method, model, examples: method.project(model, fraction=0.1)),
        (lambda model, examples: LTSFT(fraction=0.1).attach(model),
         lambda method, model, examples: method.rewind(model)),
    ],
    ids=["FishDip", "DiffPruning", "LTSFT"],
)  # fmt: skip
def test_what_is_switched_off_is_not_chosen_again_and_nothing_has_changed(attach, again):
    """What it knows isn't in the weights, so the choice would be made for the plain base."""
    examples = class_examples(6)
    model = moved(attach(llama_classifier(), examples))
    learned = answer(model, IDS)
    before = picture(switch(model))
    with pytest.raises((ValueError, RuntimeError), match="switched off"):
        again(adapted(model), model, examples)
    assert differences(before, picture(model)) == []
    assert torch.equal(answer(model, IDS), answer(llama_classifier(), IDS))
    assert torch.equal(answer(switch(model, "default"), IDS), learned)


# ---- when it fails


def without_labels():
    return [{k: v for k, v in e.items() if k != "labels"} for e in class_examples(4)]


def overflowing(model):
    """Something that makes the Fisher information of the model NaN."""
    model.score.weight.data[0, 0] = float("nan")
    return class_examples(12)


@pytest.mark.parametrize("bad", [lambda model: [], lambda model: without_labels(), overflowing])
def test_a_refresh_that_fails_leaves_the_choice_as_it_was(bad):
    model, examples = llama_classifier(), class_examples(12)
    method = FishDip(fraction=0.02, modules_to_save=HEAD)
    method.attach(model, examples)
    fit(model, examples, steps=2, lr=0.02)
    before, trains, described = masks(model), trainable(model), base_of(model, without=())
    with pytest.raises((ValueError, FloatingPointError)):
        method.refresh(model, bad(model))
    assert adapted(model) is method
    assert trainable(model) == trains
    assert base_of(model, without=()) == described
    assert all(torch.equal(mask, before[name]) for name, mask in masks(model).items())


def test_a_projection_that_fails_leaves_the_gates_as_they_were():
    model, method = llama_classifier(), DiffPruning(modules_to_save=HEAD)
    moved(method.attach(model))
    model.model.norm.weight.data = model.model.norm.weight.data.repeat_interleave(2)[
        ::2
    ]  # has no flat places
    expected, before = answer(model, IDS), picture(model)
    with pytest.raises(ValueError, match=r"'model.norm.weight' \(16,\) isn't contiguous"):
        method.project(model, fraction=1)
    assert differences(before, picture(model)) == []
    assert torch.equal(answer(model, IDS), expected)


# ---- what is left


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


def test_what_was_settled_goes_back_with_a_switch_and_with_detaching():
    model, examples = llama_classifier(), class_examples(12)
    method = FishDip(fraction=0.02)
    method.attach(model, examples)
    for seed in (1, 2):
        answer(moved(model, seed=seed), IDS)
        method.refresh(model, examples)
    learned, base = answer(model, IDS), tensors(llama_classifier())
    switch(model)
    assert differences(base, {n: t for n, t in tensors(model).items() if n in base}) == []
    assert torch.equal(answer(switch(model, "default"), IDS), learned)
    kept = detach(copy.deepcopy(model), keep=True)
    assert torch.equal(answer(kept, IDS), learned)
    assert differences(base, tensors(detach(model))) == []


def test_after_project_and_rewind_the_attachment_is_entries_that_are_saved(tmp_path):
    for method, again in ((DiffPruning(), "project"), (LTSFT(fraction=0.05), "rewind")):
        model = moved(method.attach(llama_classifier()))
        getattr(method, again)(model)
        assert {type(part).__name__ for part in find(model).parts} == {"Entries"}
        save(moved(model), tmp_path / again)


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
