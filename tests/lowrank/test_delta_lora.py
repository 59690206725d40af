"""Delta-LoRA against HF PEFT's LoRA whose weight is really written after every step, as the paper says it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pefttutor import DeltaLoRA, LoRA, attached, fit, load, save, trainable
from pefttutor.train.hooks import Hooks
from tests.lowrank.peers import drawn, lora_config, run, with_peft
from tests.memory.models import assert_estimate_is_measured
from tests.pictures import differences, picture

F64, BF16 = torch.float64, torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "names"),
    [("llama", ("q_proj", "v_proj")), ("gpt2", ("c_attn",)), ("bert", ("query", "value"))],
)
def test_it_is_a_lora_of_peft_whose_weight_is_written_after_every_step(tiny, batch, kind, names):
    """Outputs and every gradient of four steps, before step K and after it, with momentum and decay."""
    ours = DeltaLoRA(r=2, lora_alpha=3, start_steps=1, update_ratio=0.5, target_modules=names)
    base, inputs = tiny(kind, dtype=F64), batch(kind, side="left", dtype=F64)
    adapted = drawn(ours.attach(copy.deepcopy(base)))
    theirs, parameters = with_peft(base, lora_config(LoRA(r=2, lora_alpha=3, target_modules=names)))
    own = {n: adapted.get_parameter(n) for n in trainable(adapted)}
    for name, parameter in own.items():
        parameters[name].data.copy_(parameter.data)
    steps = [
        torch.optim.AdamW(trains, lr=0.02, weight_decay=0.1)
        for trains in ([*own.values()], [parameters[n] for n in own])
    ]
    layers = [name.removesuffix(".lora_A") for name in own if name.endswith("lora_A")]
    hooks, close = Hooks(adapted), {"rtol": 1e-8, "atol": 1e-10}
    for number in range(4):
        torch.testing.assert_close(run(adapted, inputs), run(theirs, inputs), **close)
        for name, parameter in own.items():
            assert parameter.grad.abs().max() > 1e-8
            torch.testing.assert_close(parameter.grad, parameters[name].grad, **close)
        products = {n: parameters[f"{n}.lora_B"] @ parameters[f"{n}.lora_A"] for n in layers}
        for step in steps:
            step.step()
            step.zero_grad()
        hooks.after_step(number)
        for n in layers if number >= 1 else ():
            moved = parameters[f"{n}.lora_B"] @ parameters[f"{n}.lora_A"] - products[n]
            weight = parameters[f"{n}.weight"].data
            weight += 0.5 * 1.5 * (moved.T if kind == "gpt2" else moved).detach()
    assert sum(trainable(adapted).values()) == ours.count(base)


def test_the_change_is_the_telescope_and_the_base_keeps_every_bit(tmp_path):
    base = nn.Sequential(nn.Linear(9, 8)).double()
    method = DeltaLoRA(r=2, lora_alpha=4, start_steps=3, update_ratio=2.0, target_modules=("0",))
    model = method.attach(copy.deepcopy(base))
    rows = [{"x": row} for row in torch.randn(8, 9, dtype=F64)]
    how = {"loss": lambda m, b: m(b["x"]).square().mean(), "lr": 0.05, "warmup": 0, "progress": False}
    with pytest.warns(
        UserWarning, match="LoRA all along, for 3 steps came before start_steps=3: give a smaller"
    ):
        fit(model, rows, steps=3, **how)
    layer = model[0]
    A_K, B_K = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    assert torch.equal(layer.lora_A_start, A_K)
    fit(model, rows, steps=3, **how)
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    delta = attached(model)["default"].parts[0].delta()
    torch.testing.assert_close(delta, (1 + 2) * 2 * B @ A - 2 * 2 * B_K @ A_K)
    assert torch.linalg.matrix_rank(delta) <= 4
    assert torch.equal(layer.weight, base[0].weight)
    save(model, tmp_path)
    again = load(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(rows[0]["x"]), model(rows[0]["x"]))


def test_a_training_that_is_too_short_is_told_so():
    model = DeltaLoRA(r=2, start_steps=2, target_modules=("0",)).attach(nn.Sequential(nn.Linear(6, 5)))
    hooks = Hooks(model)
    with pytest.warns(
        UserWarning, match="it was LoRA all along, for 0 steps came before start_steps=2: after_step was"
    ):
        hooks.warn_of_unfinished()
    for step in range(3):
        hooks.after_step(step)
    hooks.warn_of_unfinished()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_estimate_is_what_autograd_keeps(kind, dtype):
    names = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn",)}[kind]
    method = DeltaLoRA(r=4, start_steps=0, target_modules=names)
    assert_estimate_is_measured(kind, method, dtype)


def test_what_it_refuses_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(6, 4), nn.Embedding(9, 6))
    before = picture(model)
    with pytest.raises(ValueError, match="r is 5, but '0' maps 6 to 4: r must be at most 4"):
        DeltaLoRA(r=5, target_modules=("0",)).attach(model)
    with pytest.raises(ValueError, match="'1' can't be adapted: DeltaLoRA takes no embedding"):
        DeltaLoRA(r=2, target_modules=("1",)).attach(model)
    for field in ("start_steps", "update_ratio"):
        with pytest.raises(ValueError, match=f"{field} is -1; it must be"):
            DeltaLoRA(**{field: -1})
    assert differences(before, picture(model)) == []
