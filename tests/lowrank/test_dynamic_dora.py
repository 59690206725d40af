"""The other DoRA against HF PEFT's AdaLoRA, which has the same formula, and its shares and ranks against dense ones."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from peft import AdaLoraConfig
from torch import nn

from pefttutor import DynamicDoRA, attached, detach, fit, load, save
from pefttutor.parts.part import of_kind
from pefttutor.parts.triplets import Triplets
from pefttutor.train.hooks import Hooks
from tests.lowrank.peers import assert_same_as_peft, drawn, without_the_small_number
from tests.memory.models import assert_estimate_is_measured
from tests.pictures import differences, picture

F64 = torch.float64
LAYERS = ("0", "2")


def net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 6)).double()


def layers_of(model: nn.Module) -> list[Triplets]:
    return of_kind(attached(model)["default"].parts, Triplets)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("kind", "names"),
    [("llama", ("q_proj", "v_proj", "down_proj")), ("gpt2", ("c_attn",)), ("bert", ("query", "dense"))],
)
def test_outputs_and_every_gradient_are_those_of_peft(tiny, batch, kind, names, dropout):
    ours = DynamicDoRA(
        init_r=3, target_r=2, total_step=10, lora_alpha=7, target_modules=names, lora_dropout=dropout
    )
    config = AdaLoraConfig(
        init_r=3, target_r=2, total_step=10, lora_alpha=7, lora_dropout=dropout, target_modules=list(names)
    )
    inputs = batch(kind, side="left" if dropout else "right", dtype=F64)
    assert_same_as_peft(
        tiny(kind, dtype=F64), ours, config, inputs, train=bool(dropout), prepare=without_the_small_number
    )


def test_at_the_start_nothing_changes_and_the_draws_are_as_wide_as_released():
    base = nn.Sequential(nn.Linear(600, 500))
    model = DynamicDoRA(init_r=6, target_r=4, total_step=9, target_modules=("0",)).attach(copy.deepcopy(base))
    x = torch.randn(3, 600)
    assert torch.equal(model(x), base(x))
    for matrix, bound in ((model[0].lora_A, 0.1), (model[0].lora_B, 1.0)):
        assert matrix.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert matrix.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)


class Dense:
    """The rules with every ΔW written out, and with loops: what each layer's triplets were worth, and which stay."""

    def __init__(self, method: DynamicDoRA, first: int, last: int) -> None:
        self.method, self.first, self.last = method, first, last
        self.averages: dict[int, list[float]] = {}
        self.kept: set[tuple[int, int]] = set()

    def step(self, t: int, values: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        r = self.method.init_r
        if t > self.last:
            return
        for i, (c, Q, P) in enumerate(values):
            pieces = [c[k] * torch.outer(P[:, k], Q[k]) for k in range(r)]
            whole = torch.linalg.matrix_norm(sum(pieces))
            before = self.averages.get(i, [0.0] * r)
            beta = self.method.beta
            now = [float(torch.linalg.matrix_norm(piece) / (whole + 1e-8)) for piece in pieces]
            self.averages[i] = [beta * b + (1 - beta) * n for b, n in zip(before, now, strict=True)]
        if t >= self.first and ((t - self.first) % self.method.deltaT == 0 or t == self.last):
            everyone = sorted(((s, i, k) for i, own in self.averages.items() for k, s in enumerate(own)))
            full = r * len(values)
            gone = (full - self.method.target_r * len(values)) * (
                (t - self.first) / (self.last - self.first)
            ) ** 3
            self.kept = {(i, k) for _, i, k in everyone[int(gone) :]}


@pytest.mark.parametrize(
    ("schedule", "first", "last"),
    [
        ({"total_step": 20}, 3, 10),
        ({"total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 3}, 2, 9),
        ({"total_step": 9, "tinit": 0, "tfinal": 0}, 0, 8),
    ],
)
def test_over_a_training_shares_and_ranks_are_the_dense_ones(schedule, first, last):
    method = DynamicDoRA(init_r=4, target_r=2, beta=0.6, target_modules=LAYERS, **schedule)
    model, dense = method.attach(net()), Dense(method, first, last)
    hooks, generator, ranks = Hooks(model), torch.Generator().manual_seed(5), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for t in range(schedule["total_step"]):
        x = torch.randn(16, 8, generator=generator, dtype=F64)
        (model(x).square().mean() + hooks.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        dense.step(t, [tuple(v.detach().clone() for v in layer.triplets) for layer in layers_of(model)])
        hooks.after_step(t)
        torch.testing.assert_close(
            model.lora_shares, torch.tensor([dense.averages[i] for i in range(2)], dtype=F64)
        )
        kept = {
            (i, k) for i, layer in enumerate(layers_of(model)) for k in range(4) if layer.held("lora_kept")[k]
        }
        if t >= first:
            assert kept == dense.kept
            assert len(kept) == method.budget(t, 2) or t % method.deltaT
        ranks.append(sum(method.ranks(model).values()))
        if t >= last:
            assert not any(layer.held("lora_E")[~layer.held("lora_kept")].any() for layer in layers_of(model))
    assert ranks[0] == 8
    assert ranks[-1] == 4
    assert all(later <= now for now, later in pairwise(ranks))
    assert method.unfinished(model) is None


def test_the_penalty_is_the_mean_variance_until_the_budget_has_come_down():
    method = DynamicDoRA(init_r=3, target_r=2, total_step=10, var_reg_weight=0.3, target_modules=LAYERS)
    model = drawn(method.attach(net()))
    variances = [torch.var(v) for x in (model[0], model[2]) for v in (*x.lora_A, *x.lora_B.t())]
    found, expected = method.penalty(model), 0.3 * torch.stack(variances).mean()
    torch.testing.assert_close(found, expected)
    wanted = [p for n, p in model.named_parameters() if n.endswith(("lora_A", "lora_B"))]
    for one, other in zip(
        torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        torch.testing.assert_close(one, other)
    model.dynamic_dora_step.fill_(5)  # the step after which the last ones go
    assert method.penalty(model) > 0
    model.dynamic_dora_step.fill_(6)
    assert method.penalty(model) == 0


def test_a_small_layer_keeps_as_much_as_a_large_one():
    """A share is counted within a layer: what counts is not how far a layer moved."""
    method = DynamicDoRA(init_r=3, target_r=1, total_step=4, target_modules=LAYERS)
    model = drawn(method.attach(net()))
    model[0].lora_E.data.mul_(1e-6)
    hooks = Hooks(model)
    for t in range(4):
        hooks.after_step(t)
    assert all(method.ranks(model).values())


def test_a_step_under_autocast_sees_the_same_shares():
    found = []
    for cast in (False, True):
        method = DynamicDoRA(init_r=3, target_r=1, total_step=4, target_modules=LAYERS)
        model = drawn(method.attach(net().float()))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            Hooks(model).after_step(0)
        found.append(model.lora_shares)
    assert found[0].all()
    assert torch.equal(*found)


def test_files_hold_the_ranks_and_an_interrupted_training_goes_on_bit_for_bit(tmp_path):
    method = DynamicDoRA(init_r=3, target_r=1, total_step=8, target_modules=LAYERS)
    examples = [{"x": x} for x in torch.randn(12, 8, dtype=F64)]
    how = {"steps": 8, "batch_size": 4, "lr": 0.05, "progress": False, "checkpoint": tmp_path / "run"}
    models, calls = [method.attach(net()) for _ in range(3)], []

    def loss(model, batch):
        return model(batch["x"]).square().mean()

    def breaks(model, batch):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss(model, batch)

    fit(models[0], examples, loss=loss, **how)
    with pytest.warns(
        UserWarning, match=r"the budget has come to \d ranks, not to 2, for .* 2 of total_step=8"
    ):
        assert fit(models[1], examples, loss=breaks, **how).interrupted
    fit(models[2], examples, loss=loss, resume=True, **how)
    for named in (nn.Module.named_buffers, nn.Module.named_parameters):
        assert differences(dict(named(models[0])), dict(named(models[2]))) == []
    save(models[0], tmp_path / "file")
    again = load(detach(copy.deepcopy(models[0])), tmp_path / "file")
    assert method.ranks(again) == method.ranks(models[0])
    assert sum(method.ranks(again).values()) == 2
    assert int(again.dynamic_dora_step) == 8
    Hooks(again).after_step(8)
    assert method.ranks(again) == method.ranks(models[0])


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"target_r": 9, "init_r": 8}, "target_r is 9; it must be at most init_r, 8"),
        (
            {"total_step": 10, "tinit": 6, "tfinal": 4},
            r"total_step is 10; it must be more than tinit \+ tfinal, 10",
        ),
        ({"total_step": 10, "tinit": 6}, r"total_step is 10; it must be more than tinit \+ tfinal, 11"),
        ({"tinit": -1}, "tinit is -1"),
        ({"beta": 1.0}, "beta is 1.0"),
        ({"deltaT": 0}, "deltaT is 0"),
    ],
)
def test_bad_settings_are_refused(settings, why):
    with pytest.raises(ValueError, match=why):
        DynamicDoRA(**settings)


def test_it_must_know_how_long_the_training_is():
    model = net()
    before = picture(model)
    with pytest.raises(ValueError, match="total_step is None; DynamicDoRA must know"):
        DynamicDoRA(target_modules=LAYERS, init_r=2, target_r=1).attach(model)
    assert differences(before, picture(model)) == []


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_the_estimate_is_what_is_measured(kind):
    targets = {"llama": ("q_proj", "v_proj"), "gpt2": ("c_attn",), "bert": ("query", "value")}[kind]
    method = DynamicDoRA(init_r=4, target_r=2, total_step=9, target_modules=targets)
    assert_estimate_is_measured(kind, method)
