"""ReLoRA: HF PEFT's LoRA until the first merge, and a whole chain written out by hand; ranks that add up."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pefttutor import IA3, LoRA, ReLoRA, attached, detach, fit, load, save
from pefttutor.parts.movement import movements
from pefttutor.parts.restarting import cut_smallest
from pefttutor.train.hooks import Hooks
from tests.lowrank.peers import assert_same_as_peft, drawn, lora_config
from tests.pictures import differences, picture
from tests.tiny import Quantised

F64 = torch.float64
ROWS = [{"x": row} for row in torch.randn(8, 9, dtype=F64, generator=torch.Generator().manual_seed(0))]


def wide_loss(model, batch):
    """Its gradient has a full rank."""
    return (model(batch["x"]) - batch["x"].cumsum(-1)).square().mean()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("kind", "names"), [("llama", ("q_proj", "down_proj")), ("gpt2", ("c_attn",)), ("bert", ("query",))]
)
def test_until_the_first_merge_it_is_the_lora_of_peft(tiny, batch, kind, names, dropout):
    ours = ReLoRA(r=3, lora_alpha=7, target_modules=names, lora_dropout=dropout)
    inputs = batch(kind, side="left" if dropout else "right", dtype=F64)
    assert_same_as_peft(tiny(kind, dtype=F64), ours, lora_config(ours), inputs, train=dropout > 0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_merge_leaves_the_function_as_it_is_and_ranks_add_up(tiny, batch, kind):
    names = {"llama": ("q_proj",), "gpt2": ("c_attn",), "bert": ("query",)}[kind]
    base, inputs = tiny(kind, dtype=F64), batch(kind, dtype=F64)
    model = ReLoRA(r=4, reset_every=1, target_modules=names).attach(copy.deepcopy(base))
    hooks, path = Hooks(model), next(iter(attached(model)["default"].parts)).path
    for k in range(1, 8):
        drawn(model, seed=k)
        before = model(**inputs).logits
        A = model.get_submodule(path).lora_A.detach().clone()
        hooks.after_step(k)
        torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-10, atol=1e-12)
        layer = model.get_submodule(path)
        assert not layer.lora_B.any()
        assert not torch.equal(layer.lora_A, A)
        change = layer.weight - base.get_submodule(path).weight
        assert torch.linalg.matrix_rank(change) == min(4 * k, 24)


def by_hand(weight, bias, A, B, draws, *, steps, every, warmup, cut, lr, decay):
    """Steps of AdamW on A and B with its published formula; after every so many, what a merge does."""
    factors, moments, scaling = (
        [A.clone(), B.clone()],
        [torch.zeros(2, *p.shape, dtype=F64) for p in (A, B)],
        2.0,
    )
    x = torch.stack([row["x"] for row in ROWS])
    for t in range(1, steps + 1):
        leaves = [p.clone().requires_grad_() for p in factors]
        y = F.linear(x, weight + scaling * leaves[1] @ leaves[0], bias)
        (y - x.cumsum(-1)).square().mean().backward()
        since = (t - 1) % every + 1
        rate = lr * (min(1, since / warmup) if t > every else 1)
        for p, leaf, m in zip(factors, leaves, moments, strict=True):
            m[0] = 0.9 * m[0] + 0.1 * leaf.grad
            m[1] = 0.999 * m[1] + 0.001 * leaf.grad**2
            p.mul_(1 - rate * decay)
            p -= rate * (m[0] / (1 - 0.9**t)) / ((m[1] / (1 - 0.999**t)).sqrt() + 1e-8)
        if t % every == 0:
            weight = weight + scaling * factors[1] @ factors[0]
            factors = [next(draws), torch.zeros_like(B)]
            for m, v in moments:
                kept = m.abs().flatten() > m.abs().flatten().sort().values[round(cut * m.numel()) - 1]
                m *= kept.view_as(m) if cut else 1
                v *= kept.view_as(v) if cut else 1
    return weight, *factors


@pytest.mark.parametrize("cut", [0.0, 0.7, 1.0])
def test_a_whole_chain_is_the_one_written_out_by_hand(cut):
    """Merges, cut moments, and the rate that rises again, under weight decay."""
    base = nn.Sequential(nn.Linear(9, 9)).double()
    method = ReLoRA(
        r=2, lora_alpha=4, reset_every=3, restart_warmup_steps=2, optimizer_magnitude_pruning=cut, target_modules=("0",)
    )  # fmt: skip
    model = method.attach(copy.deepcopy(base))
    start = [p.detach().clone() for p in (model[0].lora_A, model[0].lora_B)]
    again = [torch.Generator().manual_seed(3 * k) for k in range(1, 4)]
    draws = iter(
        [nn.init.kaiming_uniform_(torch.empty(2, 9), a=math.sqrt(5), generator=g).double() for g in again]
    )
    how = {"lr": 0.05, "weight_decay": 0.1}
    fit(
        model, ROWS, steps=8, batch_size=8, loss=wide_loss, schedule="constant", warmup=0, max_grad_norm=None,
        progress=False, **how,
    )  # fmt: skip
    settings = {"steps": 8, "every": 3, "warmup": 2, "cut": cut, "lr": 0.05, "decay": 0.1}
    weight, A, B = by_hand(base[0].weight.detach(), base[0].bias.detach(), *start, draws, **settings)
    for found, expected in ((model[0].weight, weight), (model[0].lora_A, A), (model[0].lora_B, B)):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-7, atol=1e-9)


def test_the_smallest_of_the_moments_are_cut():
    values = torch.tensor([[3.0, -1.0, 2.0], [0.5, -4.0, 0.0]])
    for share, left in ((0.0, 5), (0.5, 3), (1.0, 0)):
        moments = values.clone()
        cut_smallest(moments, share)
        assert moments.count_nonzero() == left
        assert torch.equal(moments[moments != 0], values[moments != 0])
    moments = values.clone().t()  # also where they lie otherwise
    cut_smallest(moments, 0.5)
    assert moments.count_nonzero() == 3


@pytest.mark.parametrize("cut", [0.5, 0.9, 0.99])
def test_steps_after_a_merge_are_bounded_by_the_rate(cut):
    """Also with the gradient of A zero and moments that are kept in part: no mean is left without its mean square."""
    model = ReLoRA(
        r=4, reset_every=10, restart_warmup_steps=0, optimizer_magnitude_pruning=cut, target_modules=("0",)
    ).attach(nn.Sequential(nn.Linear(24, 24)))
    optimizer = attached(model)["default"].method.optimizer(model, lr=0.01, weight_decay=0.0)
    x, longest = torch.randn(8, 24, generator=torch.Generator().manual_seed(0)), []
    for step in range(25):
        optimizer.zero_grad()
        (model(x) - x.cumsum(-1)).square().mean().backward()
        before = [p.detach().clone() for p in optimizer.factors]
        optimizer.step()
        pairs = zip(optimizer.factors, before, strict=True)
        longest.append(max((p.detach() - old).abs().max().item() for p, old in pairs))
        attached(model)["default"].method.after_step(model, step)
    assert max(longest[10:]) < 10 * 0.01


def trained(folder, *, interrupted):
    model = ReLoRA(r=2, reset_every=2, target_modules=("0",)).attach(
        nn.Sequential(copy.deepcopy(LAYER), nn.Linear(9, 9)).double()
    )
    calls = []

    def loss(model, batch):
        calls.append(None)
        if interrupted and len(calls) == 4:
            raise KeyboardInterrupt
        return wide_loss(model[:1], batch)

    for resume in (False, True) if interrupted else (False,):
        fit(
            model,
            ROWS,
            steps=6,
            batch_size=8,
            lr=0.05,
            loss=loss,
            checkpoint=folder,
            resume=resume,
            progress=False,
        )
    return model


LAYER = nn.Linear(9, 9)


def test_an_interrupted_run_goes_on_bit_for_bit_over_its_merges(tmp_path):
    one, other = (trained(tmp_path / str(i), interrupted=bool(i)) for i in (0, 1))
    assert int(one.relora_step) == int(other.relora_step) == 6
    assert not torch.equal(one[0].weight, LAYER.weight.double())
    for name in ("weight", "lora_A", "lora_B"):
        assert torch.equal(getattr(one[0], name), getattr(other[0], name))


def test_a_file_holds_the_written_weights_and_detaching_puts_the_base_back(tmp_path):
    model = trained(tmp_path / "run", interrupted=False)
    base = nn.Sequential(copy.deepcopy(LAYER), copy.deepcopy(model[1])).double()
    said = model(ROWS[0]["x"]).detach()
    save(model, tmp_path / "adapter")
    assert torch.equal(load(copy.deepcopy(base), tmp_path / "adapter")(ROWS[0]["x"]), said)
    detach(model)
    assert differences(dict(base.named_parameters()), dict(model.named_parameters())) == []


def test_what_a_merge_puts_back_to_its_start_is_not_said_to_stand_still(tmp_path):
    """Neither in the model that was trained nor in one into which its file was read."""
    base = nn.Sequential(nn.Linear(9, 9)).double()
    model = ReLoRA(r=2, reset_every=2, target_modules=("0",)).attach(copy.deepcopy(base))

    def moved(model):
        return [movement.moved for movement in movements(attached(model)["default"])]

    assert moved(model) == [False, False]
    fit(model, ROWS, steps=2, loss=wide_loss, progress=False)
    assert not model[0].lora_B.any()
    assert moved(model) == moved(load(base, save(model, tmp_path))) == [True, None]
    assert moved(model.bfloat16()) == [None, None]


def test_a_loop_that_asks_no_hook_or_ends_too_early_is_told_so():
    model = ReLoRA(r=2, reset_every=5, target_modules=("0",)).attach(nn.Sequential(nn.Linear(6, 5)))
    with pytest.warns(
        UserWarning, match="nothing was merged in reset_every=5 steps, for after_step was never called"
    ):
        Hooks(model).warn_of_unfinished()
    Hooks(model).after_step(0)
    with pytest.warns(
        UserWarning, match="nothing was merged in reset_every=5 steps, for the training had 1 steps"
    ):
        Hooks(model).warn_of_unfinished()


def test_what_it_refuses_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), Quantised(nn.Linear(6, 6)), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    IA3(target_modules=("3",), feedforward_modules=()).attach(model, name="before")
    before = picture(model)
    for target, why in (
        ("1", "'1' shares its weight with another layer"),
        ("2", "'2' keeps its weight in a form that nothing can be added to"),
        ("3", "what 'before' makes of '3' isn't simply added to its weight"),
    ):
        with pytest.raises(ValueError, match=why):
            ReLoRA(r=2, target_modules=(target,)).attach(model)
    for field, value in (
        ("reset_every", 0),
        ("restart_warmup_steps", -1),
        ("optimizer_magnitude_pruning", 1.5),
    ):
        with pytest.raises(ValueError, match=f"{field} is {value}; it"):
            ReLoRA(**{field: value})
    assert differences(before, picture(model)) == []


def test_beside_a_lora_that_came_before_it_merges_its_own_change_alone():
    model = nn.Sequential(nn.Linear(9, 9)).double()
    drawn(LoRA(r=1, target_modules=("0",)).attach(model, name="before"))
    ReLoRA(r=2, reset_every=1, target_modules=("0",)).attach(model, name="it")
    drawn(model)
    said, own = model(ROWS[0]["x"]).detach(), model[0].get_parameter("lora_B@before").detach().clone()
    Hooks(model).after_step(0)
    torch.testing.assert_close(model(ROWS[0]["x"]).detach(), said)
    assert torch.equal(model[0].get_parameter("lora_B@before"), own)
