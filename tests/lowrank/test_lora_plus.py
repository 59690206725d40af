"""LoRA+ against HF PEFT's optimizer: the same parameters after several steps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pefttutor import LoRA, LoRAPlus, fit, trainable
from tests.lowrank.peers import EXACT, drawn, lora_config, run, with_peft

F64 = torch.float64


@pytest.mark.parametrize(
    ("kind", "names"), [("llama", ("q_proj", "down_proj")), ("bert", ("query", "value"))]
)
def test_steps_are_those_of_pefts_optimizer(tiny, batch, kind, names):
    from peft.optimizers import create_loraplus_optimizer

    ours = LoRAPlus(r=3, lora_alpha=7, target_modules=names, loraplus_lr_ratio=5)
    base, inputs = tiny(kind, dtype=F64), batch(kind, dtype=F64)
    model = drawn(ours.attach(copy.deepcopy(base)))
    theirs, parameters = with_peft(base, lora_config(ours))
    for name in trainable(model):
        parameters[name].data.copy_(model.get_parameter(name).data)
    mine = ours.optimizer(model, lr=0.01, weight_decay=0.1)
    peer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=5, loraplus_weight_decay=0.1
    )
    for _ in range(3):
        for one, optimizer in ((model, mine), (theirs, peer)):
            run(one, inputs)
            optimizer.step()
            optimizer.zero_grad()
    for name in trainable(model):
        torch.testing.assert_close(model.get_parameter(name), parameters[name], **EXACT)


def test_everything_that_trains_is_in_one_group_and_only_b_of_linear_layers_is_fast():
    model = nn.ModuleDict({"words": nn.Embedding(7, 6), "up": nn.Linear(6, 5), "head": nn.Linear(5, 3)})
    method = LoRAPlus(r=2, target_modules=("words", "up"), modules_to_save=("head",), loraplus_lr_ratio=4)
    method.attach(model)
    slow, fast = method.optimizer(model, lr=0.5, weight_decay=0.25).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert [names[id(p)] for p in fast["params"]] == ["up.lora_B"]
    assert {names[id(p)] for p in slow["params"]} == set(trainable(model)) - {"up.lora_B"}
    assert [(g["lr"], g["weight_decay"]) for g in (slow, fast)] == [(0.5, 0.25), (2.0, 0.25)]
    LoRA(r=1, target_modules=("up",)).attach(model, name="beside")  # whose B has the common rate
    slow, fast = method.optimizer(model, lr=0.5, weight_decay=0.25).param_groups
    assert [id(p) for p in fast["params"]] == [id(model["up"].lora_B)]
    assert len(slow["params"]) == len(trainable(model)) - 1


def test_fit_takes_the_optimizer_and_its_first_step_is_so_much_longer():
    method = LoRAPlus(r=2, target_modules=("0",), loraplus_lr_ratio=8)
    model = drawn(method.attach(nn.Sequential(nn.Linear(6, 5))))
    before = {n: model.get_parameter(n).detach().clone() for n in trainable(model)}
    fit(
        model, [{"x": torch.ones(6)}], steps=1, lr=1e-3, warmup=0, weight_decay=0, progress=False,
        loss=lambda model, batch: model(batch["x"]).square().mean(),
    )  # fmt: skip
    moved = {n: (model.get_parameter(n) - before[n]).abs().max().item() for n in before}
    assert moved == {"0.lora_A": pytest.approx(1e-3, rel=1e-2), "0.lora_B": pytest.approx(8e-3, rel=1e-2)}


def test_a_ratio_that_makes_no_sense_is_refused():
    with pytest.raises(
        ValueError, match=r"loraplus_lr_ratio is 0; it must be a number > 0 \(1 is LoRA; usual: 16\)"
    ):
        LoRAPlus(loraplus_lr_ratio=0)
