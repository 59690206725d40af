"""SoRA against HF PEFT's AdaLoRA, which has the same formula; the proximal step; ranks that fall."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import AdaLoraConfig
from torch import nn

from pefttutor import SoRA, fit, save
from pefttutor.lowrank.sora import soft_threshold
from pefttutor.train.hooks import Hooks
from tests.lowrank.peers import assert_same_as_peft, drawn, without_the_small_number
from tests.memory.models import assert_estimate_is_measured
from tests.pictures import differences, picture

F64, BF16 = torch.float64, torch.bfloat16


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("kind", "names"),
    [("llama", ("q_proj", "v_proj", "down_proj")), ("gpt2", ("c_attn",)), ("bert", ("query", "dense"))],
)
def test_outputs_and_every_gradient_are_those_of_peft(tiny, batch, kind, names, dropout):
    ours = SoRA(r=3, lora_alpha=7, target_modules=names, lora_dropout=dropout)
    config = AdaLoraConfig(
        init_r=3, target_r=2, total_step=10, lora_alpha=7, lora_dropout=dropout, target_modules=list(names)
    )
    inputs = batch(kind, side="left" if dropout else "right", dtype=F64)
    assert_same_as_peft(
        tiny(kind, dtype=F64), ours, config, inputs, train=dropout > 0, prepare=without_the_small_number,
        called={"lora_E": "lora_gate"},
    )  # fmt: skip


@pytest.mark.parametrize("by", [0.0, 0.25, 1.0])
def test_the_threshold_minimises_the_penalised_distance(by):
    """By trying all z on a grid; what lies between λ and 2 λ is moved, not lost."""
    values, grid = torch.linspace(-2.5, 2.5, 41, dtype=F64), torch.linspace(-3, 3, 6001, dtype=F64)
    costs = 0.5 * (grid[:, None] - values) ** 2 + by * grid[:, None].abs()
    torch.testing.assert_close(soft_threshold(values, by), grid[costs.argmin(0)], rtol=0, atol=1e-3)


def test_a_step_moves_every_gate_after_the_optimizer_and_what_is_closed_may_open():
    model = nn.Sequential(nn.Linear(6, 5))
    method = SoRA(r=3, sparse_lambda_2=0.1, target_modules=("0",))
    drawn(method.attach(model))
    gate = model[0].lora_gate
    gate.data.copy_(torch.tensor([[0.15], [-0.05], [-1.0]]))
    A = model[0].lora_A.detach().clone()
    Hooks(model).after_step(0)
    torch.testing.assert_close(gate.detach(), torch.tensor([[0.05], [0.0], [-0.9]]))
    assert torch.equal(model[0].lora_A, A)
    assert method.ranks(model) == {"0": 2}
    model(torch.ones(1, 6)).sum().backward()
    assert gate.grad[1] != 0


def test_the_penalty_is_the_mean_over_all_gates():
    model = SoRA(r=2, sparse_lambda=10, target_modules=("0", "1")).attach(
        nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    )
    gates = torch.cat([model[0].lora_gate, model[1].lora_gate])
    penalty = Hooks(model).penalty()
    torch.testing.assert_close(penalty, 10 * gates.abs().sum() / 4)
    penalty.backward()
    torch.testing.assert_close(model[0].lora_gate.grad, 2.5 * model[0].lora_gate.sign())


def test_in_a_training_ranks_fall_as_the_pull_grows(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    base = nn.Sequential(nn.Linear(6, 5))
    y = base(x).detach() + x @ torch.outer(torch.ones(5), torch.ones(6)).T  # a change of rank 1
    rows = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
    ranks, losses = [], []
    for pull in (0.0, 0.01, 1.0):
        method = SoRA(r=4, sparse_lambda_2=pull, target_modules=("0",))
        model = method.attach(copy.deepcopy(base))
        history = fit(
            model, rows, steps=150, lr=0.05, warmup=0, loss=lambda m, b: (m(b["x"]) - b["y"]).square().mean(),
        )  # fmt: skip
        ranks.append(method.ranks(model)["0"])
        losses.append(history.loss[-1])
    assert ranks[0] == 4
    assert 1 <= ranks[1] < 4
    assert ranks[2] == 0
    assert losses[1] < 0.1 * losses[2]
    assert save(model, tmp_path).is_dir()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_estimate_is_what_autograd_keeps(dropout, dtype):
    method = SoRA(r=4, target_modules=("q_proj", "down_proj"), lora_dropout=dropout)
    assert_estimate_is_measured("llama", method, dtype)


def test_what_it_refuses_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(6, 4), nn.Embedding(9, 6))
    before = picture(model)
    with pytest.raises(ValueError, match="r is 5, but '0' maps 6 to 4: r must be at most 4"):
        SoRA(r=5, target_modules=("0",)).attach(model)
    with pytest.raises(ValueError, match="'1' can't be adapted: SoRA takes no embedding"):
        SoRA(r=2, target_modules=("1",)).attach(model)
    with pytest.raises(ValueError, match="sparse_lambda_2 is -1; it must be a number ≥ 0"):
        SoRA(sparse_lambda_2=-1)
    assert differences(before, picture(model)) == []
