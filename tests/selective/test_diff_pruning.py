"""Diff-pruning: gates against their formulas, and what is left of a difference when they are gone."""

from __future__ import annotations

import math

import pytest
import torch

from pefttutor import (
    DiffPruning,
    adapted,
    fit,
    load,
    save,
)
from pefttutor.parts.entries import masks
from pefttutor.selective.diff_pruning import gate, open_probability
from tests.tiny import (
    base_weights,
    class_examples,
    llama_classifier,
    same,
    weights,
)

IDS = torch.tensor([[1, 7, 8, 9], [1, 20, 30, 5]])


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 0.7, 5.0])
def test_the_chance_of_an_open_gate_is_what_a_million_draws_say(alpha):
    u = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)).clamp(1e-7, 1 - 1e-7)
    z = gate(torch.tensor(alpha), u)
    assert abs((z != 0).float().mean() - open_probability(torch.tensor(alpha))) < 0.002
    assert z.min() >= 0
    assert z.max() <= 1


def test_the_expected_count_is_the_penalty():
    model = llama_classifier()
    size = sum(p.numel() for n, p in model.named_parameters() if "score" not in n)
    DiffPruning(alpha_init=0.3, l0_weight=2.0, structured=False, modules_to_save=("score",)).attach(model)
    expected = 2 * size / (1 + math.exp(-0.3))  # log(−l / r) = 0
    assert adapted(model).penalty(model).item() == pytest.approx(expected, rel=1e-5)
    model = DiffPruning(alpha_init=0.3, l0_weight=2.0, modules_to_save=("score",)).attach(llama_classifier())
    assert adapted(model).penalty(model).item() == pytest.approx(expected / (1 + math.exp(-0.3)), rel=1e-5)


def test_diff_pruning_trains_projects_and_trains_on_with_the_kept_entries(tmp_path):
    model, before = llama_classifier(), weights(llama_classifier())
    method = DiffPruning(l0_weight=1e-5, modules_to_save=("score",))
    method.attach(model)
    assert torch.equal(model(input_ids=IDS).logits, llama_classifier()(input_ids=IDS).logits)
    fit(model, class_examples(), steps=3, lr=0.02)
    assert same({n: v for n, v in base_weights(model).items() if n != "score.weight"},
                {n: v for n, v in before.items() if n != "score.weight"})  # fmt: skip
    deltas = {n: p for n, p in model.named_parameters() if n.endswith("_delta")}
    assert all(p.abs().max() > 0 for n, p in deltas.items() if "embed" not in n)
    method.project(model, fraction=0.02)
    chosen = masks(model)
    count = sum(int(m.sum()) for n, m in chosen.items() if n != "score.weight")
    assert count == int(0.02 * sum(v.numel() for n, v in before.items() if n != "score.weight"))
    fit(model, class_examples(), steps=3, lr=0.02, weight_decay=0.5)
    after = base_weights(model)
    for name, old in before.items():
        assert torch.equal(after[name][~chosen[name]], old[~chosen[name]])
        assert (after[name][chosen[name]] != old[chosen[name]]).all()
    save(model, tmp_path)
    again = load(llama_classifier(), tmp_path)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_everything_projected_is_the_model_that_was_trained():
    model = llama_classifier()
    method = DiffPruning(modules_to_save=("score",)).attach(model)
    fit(model, class_examples(), steps=3, lr=0.02)
    expected = model(input_ids=IDS).logits
    adapted(method).project(model, fraction=1)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="with its gates"):
        adapted(model).project(model)


def test_gates_have_their_own_learning_rate():
    model = llama_classifier()
    method = DiffPruning(alpha_lr=0.3)
    method.attach(model)
    groups = method.optimizer(model, lr=0.01, weight_decay=0.1).param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.01, 0.1), (0.3, 0.0)]
    assert len(groups[1]["params"]) == 2 * len(groups[0]["params"])
