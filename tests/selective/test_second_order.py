"""The second-order mask: the best subset of a quadratic, and signed sums."""

from __future__ import annotations

import itertools

import pytest
import torch

from pefttutor import (
    SecondOrderMask,
)
from pefttutor.parts.information import total_gradient
from pefttutor.parts.ranking import largest
from pefttutor.selective.second_order import second_order_scores
from tests.tiny import (
    class_examples,
    llama_classifier,
)


def test_on_a_quadratic_the_rule_is_the_best_subset():
    g = torch.tensor([1.0, -2.0, 3.0, 0.5, -0.1, 1.5, 0.7])
    h = torch.tensor([0.1, 1.0, 9.0, 2.0, 0.01, 4.0, 0.3])

    def loss(mask):
        delta = -(g / h) * mask
        return (g * delta + h * delta.square() / 2).sum()

    subsets = [torch.zeros(7).index_fill(0, torch.tensor(s), 1) for s in itertools.combinations(range(7), 3)]
    best = min(subsets, key=loss)
    chosen = largest({"w": second_order_scores(g, h)}, 3)["w"]
    assert torch.equal(chosen.float(), best)
    assert not torch.equal(largest({"w": second_order_scores(g)}, 3)["w"].float(), best)  # h matters here
    with pytest.raises(ValueError, match="add a damping"):
        second_order_scores(g, h * 0)


def test_signed_sums_choose_otherwise_than_sums_of_squares():
    model, examples = llama_classifier(), class_examples()
    gradient = total_gradient(model, examples)
    model.requires_grad_(True)
    from pefttutor.data.batches import collate

    model(**collate(examples)).loss.backward()
    for name, p in model.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(gradient[name], expected, rtol=1e-3, atol=1e-6)
    chosen = SecondOrderMask(fraction=0.1, modules_to_save=("score",)).masks(model, examples)
    for name, mask in chosen.items():
        assert int(mask.sum()) == max(1, int(0.1 * mask.numel())), name
    together = SecondOrderMask(fraction=0.1, per_tensor=False).masks(model, examples)
    assert sum(int(m.sum()) for m in together.values()) == int(
        0.1 * sum(m.numel() for m in together.values())
    )
    fish = largest({n: g.square() for n, g in gradient.items()}, 100)
    assert fish.keys() == together.keys()
    damped = SecondOrderMask(fraction=0.1, damping=0.1, per_tensor=False).masks(model, examples)
    assert any(not torch.equal(damped[n], together[n]) for n in damped)
    assert SecondOrderMask(fraction=0.05).attach(model, examples) is model
