"""COLA: HF PEFT's LoRA as long as there is one link, and after it a LoRA of its own on the merged weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pefttutor import COLA, LoRA, attached, detach, fit, load, save, switch
from pefttutor.train.hooks import Hooks
from tests.lowrank.peers import assert_same_as_peft, drawn, lora_config
from tests.memory.models import assert_estimate_is_measured
from tests.pictures import differences

F64 = torch.float64
ROWS = [{"x": row} for row in torch.randn(8, 9, dtype=F64, generator=torch.Generator().manual_seed(0))]
HOW = {
    "batch_size": 8,
    "lr": 0.05,
    "weight_decay": 0.1,
    "schedule": "constant",
    "warmup": 0,
    "progress": False,
}


def wide_loss(model, batch):
    """Its gradient has a full rank."""
    return (model(batch["x"]) - batch["x"].cumsum(-1)).square().mean()


def layer() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(9, 9)).double()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("kind", "names"), [("llama", ("q_proj", "down_proj")), ("gpt2", ("c_attn",)), ("bert", ("query",))]
)
def test_a_link_is_the_lora_of_peft(tiny, batch, kind, names, dropout):
    ours = COLA(r=3, lora_alpha=7, target_modules=names, lora_dropout=dropout)
    inputs = batch(kind, side="left" if dropout else "right", dtype=F64)
    assert_same_as_peft(tiny(kind, dtype=F64), ours, lora_config(ours), inputs, train=dropout > 0)


@pytest.mark.parametrize("links", [1, 2, 3])
def test_a_chain_is_a_lora_after_the_other_each_merged_and_trained_by_an_optimizer_of_its_own(links):
    """By torch's own AdamW, anew for each link, on a LoRA that is folded into the weight afterwards."""
    model, other = layer(), layer()
    COLA(r=2, lora_alpha=3, link_steps=4, target_modules=("0",)).attach(model)
    fit(model, ROWS, steps=4 * links, loss=wide_loss, **HOW)
    x = torch.stack([row["x"] for row in ROWS])
    for link in range(links):
        lora = LoRA(r=2, lora_alpha=3, target_modules=("0",), init_seed=4 * link)
        lora.attach(other)
        optimizer = torch.optim.AdamW(
            [p for p in other.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1
        )
        for _ in range(4):
            optimizer.zero_grad()
            wide_loss(other, {"x": x}).backward()
            torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
            optimizer.step()
        detach(other, keep=True)
    torch.testing.assert_close(model[0].weight, other[0].weight, rtol=1e-9, atol=1e-11)
    rank = torch.linalg.matrix_rank(model[0].weight - layer()[0].weight, tol=1e-9)
    assert rank == 2 * links


def test_the_optimizer_forgets_its_links_and_nothing_of_what_trains_beside_them():
    """The head that the method trains begins anew with each link; a LoRA of another name goes on."""
    model = nn.Sequential(layer()[0], nn.Linear(9, 9).double())
    LoRA(r=1, target_modules=("0",)).attach(model, name="beside")
    COLA(r=2, link_steps=2, target_modules=("0",), modules_to_save=("1",)).attach(model, name="it")
    hooks = Hooks(switch(model, "beside", "it"))
    optimizer = hooks.optimizer(lr=0.01, weight_decay=0.0)
    for step in range(3):
        optimizer.zero_grad()
        wide_loss(model, {"x": ROWS[0]["x"]}).backward()
        optimizer.step()
        hooks.after_step(step)
    taken = {name: int(optimizer.state[p]["step"]) for name, p in model.named_parameters() if p.requires_grad}
    links = dict.fromkeys(("0.lora_A@it", "0.lora_B@it", "1.weight", "1.bias"), 1)
    assert taken == {"0.lora_A@beside": 3, "0.lora_B@beside": 3} | links


def test_a_merge_leaves_the_function_as_it_is():
    model = drawn(COLA(r=2, link_steps=1, target_modules=("0",)).attach(layer()))
    said = model(ROWS[0]["x"])
    Hooks(model).after_step(0)
    torch.testing.assert_close(model(ROWS[0]["x"]), said, rtol=1e-12, atol=1e-12)
    assert not model[0].lora_B.any()


def test_an_interrupted_chain_goes_on_bit_for_bit_and_its_file_comes_back(tmp_path):
    """Interrupted in the second link, whose optimizer has had one step."""
    found = []
    for interrupted in (False, True):
        model, calls = COLA(r=2, link_steps=2, target_modules=("0",)).attach(layer()), []

        def loss(model, batch, calls=calls, interrupted=interrupted):
            calls.append(None)
            if interrupted and len(calls) == 4:
                raise KeyboardInterrupt
            return wide_loss(model, batch)

        for resume in (False, True) if interrupted else (False,):
            fit(model, ROWS, steps=5, loss=loss, checkpoint=tmp_path / str(interrupted), resume=resume, **HOW)
        found.append(model)
    one, other = found
    assert differences(dict(one.state_dict()), dict(other.state_dict())) == []
    save(one, tmp_path / "adapter")
    assert torch.equal(load(layer(), tmp_path / "adapter")(ROWS[0]["x"]), one(ROWS[0]["x"]))
    detach(one)
    assert differences(dict(layer().state_dict()), dict(one.state_dict())) == []


def test_a_loop_that_asks_no_hook_or_ends_too_early_is_told_so():
    model = COLA(r=2, link_steps=5, target_modules=("0",)).attach(layer())
    with pytest.warns(
        UserWarning, match="nothing was merged in link_steps=5 steps, for after_step was never called"
    ):
        Hooks(model).warn_of_unfinished()
    Hooks(model).after_step(0)
    with pytest.warns(
        UserWarning, match="nothing was merged in link_steps=5 steps, for the training had 1 steps"
    ):
        Hooks(model).warn_of_unfinished()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimate_is_what_autograd_keeps(dtype):
    assert_estimate_is_measured("llama", COLA(r=4, target_modules=("q_proj", "down_proj")), dtype)


def test_what_it_refuses_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="'1' shares its weight with another layer"):
        COLA(r=2, target_modules=("1",)).attach(model)
    with pytest.raises(ValueError, match="r is 7, but '0' maps 6 to 6: r must be at most 6"):
        COLA(r=7, target_modules=("0",)).attach(model)
    with pytest.raises(ValueError, match="link_steps is 0; it must be a whole number ≥ 1"):
        COLA(link_steps=0)
    assert attached(model) == {}
    assert differences(dict(before), dict(model.state_dict())) == []
