"""LT-SFT's θ₀: where it is kept, the pull towards it, and the difference to it."""

from __future__ import annotations

import copy

import pytest
import torch

from pefttutor import LTSFT, fit
from pefttutor.parts.entries import entries
from pefttutor.selective.lt_sft import difference
from tests.tiny import class_examples, language_examples, llama, llama_classifier, weights


def test_the_start_follows_the_model_and_is_not_saved():
    plain, model = llama(), llama()
    method = LTSFT(fraction=0.1)
    method.attach(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    kept = {n: b for n, b in model.named_buffers() if n.endswith("_start")}
    assert len(kept) == len(list(plain.parameters()))  # a tied one once
    assert {b.dtype for b in copy.deepcopy(model).double().buffers() if b.dim() > 1} == {torch.float64}
    assert all(b.is_meta for b in copy.deepcopy(model).to("meta").buffers())
    fit(model, language_examples(), steps=2, lr=0.02)
    method.rewind(model)
    assert not any(n.endswith("_start") for n, _ in model.named_buffers())
    after = weights(model)
    assert all(torch.equal(after[n], p) for n, p in plain.named_parameters())
    with pytest.raises(RuntimeError, match="phase 1"):
        method.rewind(model)


def test_the_pull_is_the_mean_distance_and_its_gradient_a_sign():
    model = llama_classifier().double()
    method = LTSFT(l1_weight=3.0, modules_to_save=("score",))
    method.attach(model)
    before, generator = weights(model), torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    n = sum(p.numel() for p in model.parameters())
    change = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    penalty = method.penalty(model)
    torch.testing.assert_close(penalty.item(), 3 / n * sum(c.abs().sum().item() for c in change.values()))
    penalty.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 3 / n * change[name].sign())


def test_the_pull_keeps_nearer_and_ends_with_phase_1():
    moved = []
    for l1_weight in (0.0, 1e4):
        model = llama_classifier()
        before, method = weights(model), LTSFT(l1_weight=l1_weight)
        method.attach(model)
        fit(model, class_examples(), steps=4, lr=0.01)
        moved.append(sum((v - before[n]).abs().sum().item() for n, v in weights(model).items()))
        method.rewind(model)
        assert method.penalty(model).item() == 0
    assert moved[1] < 0.8 * moved[0]
    with pytest.raises(ValueError, match=r"l1_weight is -1"):
        LTSFT(l1_weight=-1)


def test_the_difference_is_that_of_the_values_even_before_they_are_written():
    model = llama_classifier()
    method = LTSFT(fraction=0.05)
    method.attach(model)
    fit(model, class_examples(), steps=2, lr=0.02)
    method.rewind(model)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.5)  # as optimizer.step() of a loop of one's own
    found = difference(model, llama_classifier())
    assert found.keys() == entries(model).keys()
    for name, (_, change) in found.items():
        torch.testing.assert_close(change, torch.full_like(change, 0.5), msg=name)
