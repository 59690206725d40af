"""IncreLoRA against HF PEFT's AdaLoRA, which has the same formula, and dense autograd; ranks that grow."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from peft import AdaLoraConfig
from torch import nn

from pefttutor import IncreLoRA, attached, fit, load, save
from pefttutor.parts.growing import AHEAD
from pefttutor.train.hooks import Hooks
from tests.lowrank.peers import assert_same_as_peft, drawn, without_the_small_number
from tests.memory.models import assert_estimate_is_measured
from tests.pictures import differences, picture

F64, BF16 = torch.float64, torch.bfloat16
TWO = {"target_modules": ("0", "2")}


def net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 6)).double()


def parts_of(model):
    return [part for part in attached(model)["default"].parts if hasattr(part, "triplets")]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("kind", "names"),
    [("llama", ("q_proj", "v_proj", "down_proj")), ("gpt2", ("c_attn",)), ("bert", ("query", "dense"))],
)
def test_outputs_and_every_gradient_are_those_of_peft(tiny, batch, kind, names, train, dropout):
    """In training ΔW is formed to be watched, in evaluation it isn't."""
    ours = IncreLoRA(init_r=3, target_r=3, max_r=3, lora_alpha=7, target_modules=names, lora_dropout=dropout)
    config = AdaLoraConfig(
        init_r=3, target_r=2, total_step=10, lora_alpha=7, lora_dropout=dropout, target_modules=list(names)
    )
    inputs = batch(kind, side="left" if dropout else "right", dtype=F64)
    assert_same_as_peft(
        tiny(kind, dtype=F64), ours, config, inputs, train=train, prepare=without_the_small_number
    )


@pytest.mark.parametrize("by_rank", [False, True])
def test_what_counts_and_what_learns_in_advance_against_dense_autograd(by_rank):
    """Of five triplets two count and one learns with λ = 0.00001; the others get no gradient. And I."""
    model = IncreLoRA(init_r=2, target_r=4, max_r=5, lora_alpha=6, scale_by_rank=by_rank, **TWO).attach(net())
    drawn(model).train()
    part, x = parts_of(model)[0], torch.randn(9, 8, dtype=F64)
    part.reserve(1, torch.Generator().manual_seed(0))
    leaves = [t.detach().clone().requires_grad_() for t in part.triplets]
    lambdas, Q, P = leaves
    used = torch.cat([lambdas[:2], torch.full((1, 1), AHEAD, dtype=F64)])
    dense = 6 / (2 if by_rank else 4) * P[:, :3] @ (used * Q[:3])
    dense.retain_grad()
    later = model[2]
    y = torch.tanh(x @ (model[0].weight + dense).T + model[0].bias)
    expected = y @ (later.weight + parts_of(model)[1].delta()).T + later.bias
    found = model(x)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for own, leaf in zip(part.triplets, leaves, strict=True):
        torch.testing.assert_close(own.grad, leaf.grad)
    assert not part.held("lora_E").grad[2:].any()
    assert part.held("lora_A").grad[2].any()
    assert not part.held("lora_A").grad[3:].any()
    once = (dense.detach() * dense.grad).abs().sum() / 56**0.5
    torch.testing.assert_close(part.seen, once)
    model(x).square().sum().backward()  # a second pass before the step
    model.eval()(x).square().sum().backward()  # and one that isn't training
    torch.testing.assert_close(part.seen, 2 * once)
    torch.testing.assert_close(part.delta(), dense.detach())


def test_a_layer_counts_by_its_averaged_sensitivity_and_uncertainty():
    model = IncreLoRA(target_r=2, max_r=4, **TWO).attach(net())
    part, sensitivity, uncertainty = parts_of(model)[0], 0.0, 0.0
    for now in (3.0, 1.0, 4.0):
        part.seen = torch.tensor(now, dtype=F64)
        part.learn_importance(0.8, 0.6)
        sensitivity = 0.8 * sensitivity + 0.2 * now
        uncertainty = 0.6 * uncertainty + 0.4 * abs(now - sensitivity)
        assert part.score().item() == pytest.approx(sensitivity * uncertainty)
    part.learn_importance(0.8, 0.6)  # no pass came through
    sensitivity *= 0.8
    assert part.score().item() == pytest.approx(sensitivity * (0.6 * uncertainty + 0.4 * sensitivity))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_under_autocast_what_learns_in_advance_is_seen_and_learns(dtype):
    """All that ΔW has at first is λ = 0.00001, less than half precision can tell from nothing."""
    x, found = torch.randn(9, 8, generator=torch.Generator().manual_seed(0)), []
    for cast in (False, True):
        model = IncreLoRA(target_r=2, max_r=4, **TWO).attach(net().float()).train()
        for part in parts_of(model):
            part.reserve(1, torch.Generator().manual_seed(0))
        with torch.autocast("cpu", dtype=dtype, enabled=cast):
            loss = 1e3 * model(x).square().sum()
        loss.backward()
        part = parts_of(model)[0]
        found.append([part.seen.clone(), part.held("lora_A").grad[1], part.held("lora_B").grad[:, 1]])
        part.learn_importance(0.8, 0.6)
        assert part.score() > 0
    for exact, cast in zip(*found, strict=True):
        assert cast.dtype == torch.float32
        assert (exact - cast).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(("by_rank", "shrinks"), [(False, 1.0), (True, 2 / 3)])
def test_a_layer_that_grows_keeps_its_function_unless_s_follows_the_rank(by_rank, shrinks):
    """In the released code what was learned shrinks to r / (r + 1)."""
    model = drawn(IncreLoRA(init_r=2, target_r=3, scale_by_rank=by_rank, max_r=5, **TWO).attach(net()))
    part = parts_of(model)[0]
    part.reserve(1, torch.Generator().manual_seed(0))
    before = part.delta()
    part.grow(1)
    torch.testing.assert_close(part.delta(), shrinks * before, rtol=1e-4, atol=1e-6)
    assert part.held("lora_rank").tolist() == [3, 0]
    assert part.held("lora_E")[2].item() == AHEAD


def test_what_learns_in_advance_is_drawn_once():
    """Asked to hold more in advance, or given rank, a layer keeps what has learned."""
    part = parts_of(drawn(IncreLoRA(target_r=3, max_r=5, **TWO).attach(net())))[0]
    _, Q, P = part.triplets
    generator = torch.Generator().manual_seed(0)
    rows = []
    for ahead in (1, 2):
        part.reserve(ahead, generator)
        rows.append((Q.detach().clone(), P.detach().clone()))
    part.grow(1)
    part.reserve(2, generator)
    rows.append((Q.detach().clone(), P.detach().clone()))
    for k, (before, after) in enumerate(itertools.pairwise(rows), start=2):
        for one, other in ((before[0], after[0]), (before[1].T, after[1].T)):
            assert torch.equal(one[:k], other[:k])
            assert not torch.isclose(one[k], other[k]).any()  # the next one is drawn anew
            assert torch.equal(one[k + 1 :], other[k + 1 :])


def test_ranks_grow_where_the_loss_asks_for_them_until_all_are_given_out():
    """The second layer's output isn't asked for in half of the features, and the first isn't asked for at all."""
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("idle", "busy")}).double()
    method = IncreLoRA(
        target_r=3, max_r=4, incre_interval=3, top_h=1, init_warmup=2, target_modules=("idle", "busy")
    )
    method.attach(model)
    x = torch.randn(20, 8, dtype=F64, generator=torch.Generator().manual_seed(1))
    seen = []

    def loss(model, batch):
        seen.append(sum(method.ranks(model).values()))
        apart = 1e-3 * model["idle"](batch["x"]).mean()
        return (model["busy"](batch["x"]) - batch["x"].flip(-1)).square().mean() + apart

    steps = method.steps_needed(2)
    assert steps == 3 * 4 + 1
    how = {"batch_size": 20, "lr": 0.05, "loss": loss, "progress": False, "warmup": 0, "schedule": "constant"}
    fit(model, [{"x": row} for row in x], steps=steps, **how)
    assert seen == [2] * 4 + [3] * 3 + [4] * 3 + [5] * 3
    assert method.ranks(model) == {"idle": 2, "busy": 4}  # three to the busy one, which is full then
    part = next(part for part in attached(model)["default"].parts if getattr(part, "path", "") == "busy")
    assert not part.watches
    assert part.held("lora_rank").tolist() == [4, 0]  # and nothing learns in advance any more
    assert torch.linalg.matrix_rank(part.delta()) == 4
    fit(model, [{"x": row} for row in x], steps=2, **how)
    assert sum(method.ranks(model).values()) == 6


def test_the_penalty_is_that_of_the_triplets_in_use():
    model = drawn(
        IncreLoRA(init_r=2, target_r=3, max_r=5, orth_reg_weight=0.3, target_modules=("0",)).attach(net())
    )
    Q, P = model[0].lora_A, model[0].lora_B
    eye = torch.eye(2, dtype=F64)
    expected = 0.3 * ((Q[:2] @ Q[:2].T - eye).norm() + (P[:, :2].T @ P[:, :2] - eye).norm()) / 2
    found = Hooks(model).penalty()
    torch.testing.assert_close(found, expected)
    found.backward()
    assert not Q.grad[2:].any()
    parts_of(model)[0].reserve(1, torch.Generator().manual_seed(0))
    eye = torch.eye(3, dtype=F64)
    expected = 0.3 * ((Q[:3] @ Q[:3].T - eye).norm() + (P[:, :3].T @ P[:, :3] - eye).norm()) / 2
    torch.testing.assert_close(Hooks(model).penalty(), expected)


def test_a_saved_one_goes_on_growing(tmp_path):
    model = IncreLoRA(target_r=3, max_r=4, incre_interval=2, top_h=1, **TWO).attach(net())
    hooks, x = Hooks(model), torch.randn(5, 8, dtype=F64)
    for step in range(4):
        model.train()(x).square().sum().backward()
        hooks.after_step(step)
    save(model, tmp_path)
    again = load(net(), tmp_path)
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert pairs(again) == pairs(model)
    for each in (model, again):
        Hooks(each).after_step(4)
    assert pairs(again) == pairs(model)
    assert sum(rank for rank, _ in pairs(again)) == 4


def pairs(model):
    return [tuple(part.held("lora_rank").tolist()) for part in parts_of(model)]


def test_a_loop_that_asks_no_hook_or_ends_too_early_is_told_so():
    model = IncreLoRA(target_r=3, max_r=4, incre_interval=10, top_h=1, **TWO).attach(net())
    with pytest.warns(UserWarning, match="the ranks never grew from 2, for after_step was never called"):
        Hooks(model).warn_of_unfinished()
    Hooks(model).after_step(0)
    with pytest.warns(
        UserWarning, match="come to 2, not to 6, for the training had 1 steps and growing takes 41"
    ):
        Hooks(model).warn_of_unfinished()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_estimate_is_what_autograd_keeps(dropout, dtype):
    method = IncreLoRA(
        init_r=4, target_r=4, max_r=4, target_modules=("q_proj", "down_proj"), lora_dropout=dropout
    )
    assert_estimate_is_measured("llama", method, dtype)


def test_what_it_refuses_leaves_the_model_as_it_was():
    model = net()
    before = picture(model)
    with pytest.raises(ValueError, match="max_r is 8, but '0' maps 8 to 7: max_r must be at most 7"):
        IncreLoRA(max_r=8, **TWO).attach(copy.deepcopy(model))
    for settings in ({"init_r": 3, "target_r": 2}, {"target_r": 5, "max_r": 4}):
        with pytest.raises(
            ValueError, match=r"init_r, target_r and max_r are \d, \d and \d+; none may be larger"
        ):
            IncreLoRA(**settings)
    for field, value in (("top_h", 0), ("incre_interval", 0), ("beta1", 1.0)):
        with pytest.raises(ValueError, match=f"{field} is {value}; it"):
            IncreLoRA(**{field: value})
    assert IncreLoRA(init_r=3, target_r=3).target_r == 3  # equal is allowed: then it never grows
    assert differences(before, picture(model)) == []
