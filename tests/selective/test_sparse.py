"""SparseFineTuning: full fine-tuning where all is chosen, a tenth of its cost at a tenth, and decay inside alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pefttutor import SparseFineTuning, fit, trainable
from pefttutor.parts.ranking import largest
from tests.tiny import base_weights, language_examples, llama


def full(model):
    return model.requires_grad_(True)


def test_with_everything_chosen_fit_is_full_fine_tuning():
    one, two = full(llama()), llama()
    fit(one, language_examples(), steps=5, lr=0.01)
    SparseFineTuning().attach(
        two, {n: torch.ones_like(p, dtype=torch.bool) for n, p in two.named_parameters()}
    )
    fit(two, language_examples(), steps=5, lr=0.01)
    other = base_weights(two)
    for name, weight in base_weights(one).items():
        torch.testing.assert_close(other[name], weight, rtol=1e-5, atol=1e-7)


def test_optimizer_state_is_at_most_a_tenth_at_a_tenth():
    def state_bytes(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        model(input_ids=torch.tensor([[1, 7, 8, 9]]), labels=torch.tensor([[1, 7, 8, 9]])).loss.backward()
        optimizer.step()
        states = [v for s in optimizer.state.values() for v in s.values() if v.dim()]
        return sum(v.numel() * v.element_size() for v in states)

    dense, sparse = full(llama()), llama()
    scores = {name: torch.rand(p.shape) for name, p in sparse.named_parameters()}
    k = sum(p.numel() for p in sparse.parameters()) // 10
    SparseFineTuning().attach(sparse, largest(scores, k))
    assert state_bytes(sparse) <= 0.1 * state_bytes(dense)


def test_weight_decay_pulls_the_chosen_entries_and_nothing_else():
    """Without a gradient, AdamW multiplies with 1 − lr · λ in each step, and the others keep every bit."""
    model = nn.Sequential(nn.Linear(4, 3))
    before = model[0].weight.detach().clone()
    SparseFineTuning().attach(model, {"0.weight": torch.tensor([1, 5])})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        (0 * model(torch.ones(1, 4)).sum()).backward()
        optimizer.step()
    model(torch.ones(1, 4))
    expected = before.clone().view(-1)
    expected[[1, 5]] *= (1 - 0.1 * 0.5) ** 3
    torch.testing.assert_close(model[0].weight.detach().view(-1), expected)
    outside = torch.ones(12).bool().index_fill(0, torch.tensor([1, 5]), False)
    assert torch.equal(model[0].weight.view(-1)[outside], before.view(-1)[outside])


def test_as_many_values_train_as_are_chosen_and_without_masks_none():
    model = llama()
    with pytest.raises(
        ValueError, match=r"SparseFineTuning needs masks: attach\(model, \{'layer.weight': booleans"
    ):
        SparseFineTuning().attach(model)
    SparseFineTuning().attach(model, {"model.norm.weight": torch.tensor([3, 1])})
    assert trainable(model) == {"model.norm.weight_values": 2}
