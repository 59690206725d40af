"""LT-SFT: where θ₀ is kept, the pull towards it, the way back to it, and the difference to it."""

from __future__ import annotations

import copy

import pytest
import torch

from pefttutor import (
    LTSFT,
    fit,
    load,
    save,
)
from pefttutor.parts.entries import entries, masks
from pefttutor.parts.ranking import largest
from pefttutor.selective.lt_sft import add_differences, difference
from tests.tiny import (
    base_weights,
    class_examples,
    language_examples,
    llama,
    llama_classifier,
    same,
    weights,
)


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


def test_rewinding_is_bit_exact_and_only_what_moved_most_trains():
    model, before = llama_classifier(), weights(llama_classifier())
    method = LTSFT(fraction=0.1)
    method.attach(model)
    fit(model, class_examples(), steps=3, lr=0.02, weight_decay=0.3)
    moved = {n: (v - before[n]).abs() for n, v in weights(model).items()}
    method.rewind(model)
    assert same(base_weights(model), before)
    expected = largest(moved, int(0.1 * sum(v.numel() for v in before.values())))
    chosen = masks(model)
    assert all(torch.equal(chosen[name], mask) for name, mask in expected.items())
    fit(model, class_examples(), steps=3, lr=0.02, weight_decay=0.3)
    for name, new in base_weights(model).items():
        assert torch.equal(new[~chosen[name]], before[name][~chosen[name]])


def test_differences_add_up_in_any_order():
    def trained(seed):
        model = llama_classifier()
        method = LTSFT(fraction=0.05)
        method.attach(model)
        fit(model, class_examples(seed=seed), steps=3, lr=0.02)
        method.rewind(model)
        fit(model, class_examples(seed=seed), steps=3, lr=0.02)
        return model, difference(model, llama_classifier())

    (one, task), (_, language) = trained(2), trained(9)
    back = add_differences(llama_classifier(), task)
    torch.testing.assert_close(base_weights(back), base_weights(one), rtol=1e-6, atol=1e-7)
    both = weights(add_differences(llama_classifier(), task, language))
    swapped = weights(add_differences(llama_classifier(), language, task))
    torch.testing.assert_close(both, swapped, rtol=1e-6, atol=1e-7)
    for name in task:
        free = ~torch.isin(task[name][0], language[name][0]) if name in language else slice(None)
        where = task[name][0][free]  # chosen by one alone: exactly that one's values
        assert torch.equal(both[name].flatten()[where], base_weights(back)[name].flatten()[where])


def test_lt_sft_in_its_first_phase_is_full_fine_tuning_and_can_be_saved(tmp_path):
    full, model = llama_classifier().requires_grad_(True), LTSFT().attach(llama_classifier())
    for one in (full, model):
        fit(one, class_examples(), steps=3, lr=0.02)
    assert same(weights(full), weights(model))
    save(model, tmp_path)
    assert same(weights(load(llama_classifier(), tmp_path)), weights(model))
    with pytest.raises(RuntimeError, match="phase 1"):
        LTSFT().rewind(llama_classifier())
    with pytest.raises(ValueError, match="doesn't fit this model"):
        add_differences(llama_classifier(), {"nowhere": (torch.tensor([0]), torch.ones(1))})
