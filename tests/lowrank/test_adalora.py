"""AdaLoRA against HF PEFT: outputs, gradients, the penalty, and the ranks over whole trainings; and its own rules."""

from __future__ import annotations

import copy
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pefttutor import (
    AdaLoRA,
    attached,
    callback,
    detach,
    diagnose,
    fit,
    load,
    memory,
    merge,
    save,
    trainable,
    unmerge,
)  # fmt: skip
from pefttutor.memory.measured import watch_saved
from pefttutor.parts.importances import IMPORTANCE
from pefttutor.parts.triplets import KEPT
from pefttutor.train.hooks import Hooks
from pefttutor.widgets.spectrum import updates
from tests.lowrank.peers import EXACT, assert_same_as_peft, drawn, with_peft, without_the_small_number
from tests.memory.models import batch_of, model_of
from tests.pictures import differences, picture

F64, BF16 = torch.float64, torch.bfloat16


def config_of(ours: AdaLoRA):
    from peft import AdaLoraConfig

    return AdaLoraConfig(
        init_r=ours.init_r, target_r=ours.target_r, total_step=ours.total_step, tinit=ours.tinit, tfinal=ours.tfinal,
        deltaT=ours.deltaT, beta1=ours.beta1, beta2=ours.beta2, orth_reg_weight=ours.orth_reg_weight,
        lora_alpha=ours.lora_alpha, lora_dropout=ours.lora_dropout, target_modules=list(ours.target_modules),
        modules_to_save=list(ours.modules_to_save) or None,
    )  # fmt: skip


# ---- HF PEFT


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("kind", "names", "heads"),
    [
        ("llama", ("q_proj", "v_proj", "down_proj"), ()),
        ("gpt2", ("c_attn", "c_proj"), ()),
        ("bert", ("query", "dense"), ("classifier",)),
        ("t5", ("q", "wo"), ()),
    ],
)
def test_outputs_and_every_gradient_are_those_of_peft(tiny, batch, kind, names, heads, dropout):
    if heads:
        names = ("query", "output.dense")
    ours = AdaLoRA(
        init_r=3, target_r=2, total_step=10, lora_alpha=7, target_modules=names, lora_dropout=dropout,
        modules_to_save=heads,
    )  # fmt: skip
    inputs = batch(kind, side="left" if dropout else "right", dtype=F64)
    assert_same_as_peft(
        tiny(kind, dtype=F64),
        ours,
        config_of(ours),
        inputs,
        train=dropout > 0,
        prepare=without_the_small_number,
    )


def test_the_penalty_and_its_gradient_are_those_of_peft(tiny, batch):
    names = ("query", "value")
    ours = AdaLoRA(init_r=3, target_r=1, total_step=10, orth_reg_weight=0.3, target_modules=names)
    inputs = batch("bert", dtype=F64)
    adapted = drawn(ours.attach(tiny("bert", dtype=F64)))
    theirs, parameters = with_peft(tiny("bert", dtype=F64), config_of(ours))
    for name in trainable(adapted):
        parameters[name].data.copy_(adapted.get_parameter(name).data)
    with_penalty = theirs.base_model(**inputs).loss
    theirs.peft_config["default"].orth_reg_weight = 0
    expected = with_penalty - theirs.base_model(**inputs).loss
    found = Hooks(adapted).penalty()
    torch.testing.assert_close(found, expected, **EXACT)
    found.backward()
    expected.backward()
    for name in trainable(adapted):
        if "lora_E" not in name:
            torch.testing.assert_close(adapted.get_parameter(name).grad, parameters[name].grad, **EXACT)


def test_the_squared_penalty_is_the_papers_sum():
    model = drawn(AdaLoRA(
        init_r=2, target_r=1, total_step=9, squared_penalty=True, orth_reg_weight=0.1, target_modules=("0",)
    ).attach(nn.Sequential(nn.Linear(5, 4))))  # fmt: skip
    Q, P = model[0].lora_A, model[0].lora_B
    expected = (P.T @ P - torch.eye(2)).square().sum() + (Q @ Q.T - torch.eye(2)).square().sum()
    torch.testing.assert_close(Hooks(model).penalty(), 0.1 * expected)


@pytest.mark.parametrize("squared", [True, False])
def test_the_penalty_of_what_is_orthogonal_is_zero_and_has_a_gradient(squared):
    model = AdaLoRA(
        init_r=2, target_r=1, total_step=9, squared_penalty=squared, target_modules=("0",)
    ).attach(nn.Sequential(nn.Linear(5, 4)))
    model[0].lora_A.data, model[0].lora_B.data = torch.eye(2, 5), torch.eye(4, 2)
    with torch.autocast("cpu", dtype=BF16):
        penalty = Hooks(model).penalty()
    penalty.backward()
    assert penalty.item() == 0
    assert not model[0].lora_A.grad.any()


SCHEDULES = [
    {"total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 2},
    {"total_step": 9, "tinit": 0, "tfinal": 1, "deltaT": 1},
    {"total_step": 10, "tinit": 3, "tfinal": 4, "deltaT": 5},
    {"total_step": 30, "tinit": 0, "tfinal": 2, "deltaT": 1},
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_over_a_training_ranks_and_importance_are_those_of_peft(schedule):
    """The same gradients of both, drawn anew in each step; ranks come back on the way."""
    ours = AdaLoRA(init_r=3, target_r=1, beta1=0.7, beta2=0.6, target_modules=("0", "1", "2"), **schedule)
    base = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 5), nn.Linear(5, 4)).double()
    model = ours.attach(copy.deepcopy(base))
    theirs, parameters = with_peft(base, config_of(ours))
    hooks, generator, seen = Hooks(model), torch.Generator().manual_seed(5), []
    for name in trainable(model):
        parameters[name].data.copy_(model.get_parameter(name).data)
    optimizers = [torch.optim.SGD([of[n] for n in trainable(model)], lr=0.1) for of in (
        dict(model.named_parameters()), parameters)]  # fmt: skip
    for step in range(schedule["total_step"]):
        for name in trainable(model):
            p = model.get_parameter(name)
            p.grad = torch.randn(p.shape, generator=generator, dtype=F64) * torch.rand(
                (), generator=generator
            )
            parameters[name].grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        hooks.after_step(step)
        theirs.base_model.update_and_allocate(step)
        for name in trainable(model):
            torch.testing.assert_close(model.get_parameter(name), parameters[name], **EXACT)
        seen.append(ours.ranks(model))
        allocator = theirs.base_model.rankallocator
        for name, ema in allocator.exp_avg_ipt.items():
            if "0.lora_A" in name:
                of_Q = model.get_buffer(IMPORTANCE)[0, 6:21].view(3, 5)  # behind six λ of two layers
                torch.testing.assert_close(of_Q, ema, **EXACT)
    budgets = [sum(ranks.values()) for ranks in seen]
    assert budgets[0] == 9
    assert budgets[-1] == 3
    assert ours.unfinished(model) is None
    if schedule["total_step"] == 30:
        assert any(later[n] > ranks[n] for ranks, later in pairwise(seen) for n in ranks)
    fixed = seen[schedule["total_step"] - schedule["tfinal"] :]
    assert all(ranks == fixed[0] for ranks in fixed)


@pytest.mark.parametrize("schedule", [*SCHEDULES, {"total_step": 40, "tinit": 5, "tfinal": 10, "deltaT": 1}])
def test_the_budget_is_that_of_peft_and_comes_to_its_target_also_without_a_tail(schedule):
    from peft.tuners.adalora.layer import RankAllocator

    ours = AdaLoRA(init_r=12, target_r=4, target_modules=("0",), **schedule)
    layers = SimpleNamespace(named_parameters=lambda: [("0.lora_A.default", torch.zeros(12, 1))])
    allocator = RankAllocator(layers, config_of(ours), "default")
    steps = range(schedule["total_step"])
    assert [ours.budget(t, 1) for t in steps] == [allocator.budget_schedule(t)[0] for t in steps]
    plain = AdaLoRA(init_r=12, target_r=4, total_step=3, target_modules=("0",))
    assert [plain.budget(t, 4) for t in range(4)] == [
        48,
        25,
        16,
        16,
    ]  # with theirs 17: the cube isn't zero yet


# ---- its own rules


def trained(method: AdaLoRA, steps: int, model: nn.Module | None = None) -> nn.Module:
    """Steps of one's own, on noise."""
    model = method.attach(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 6))) if model is None else model
    hooks, generator = Hooks(model), torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(steps):
        loss = model(torch.randn(8, 5, generator=generator)).square().mean()
        (loss + hooks.penalty()).backward()
        optimizer.step()
        hooks.after_step(step)
        optimizer.zero_grad()
    return model


LAYERS = ("0", "1")


def test_a_target_as_high_as_the_start_takes_nothing_away():
    method = AdaLoRA(init_r=3, target_r=3, total_step=5, target_modules=LAYERS)
    model = trained(method, 5)
    assert method.ranks(model) == {"0": 3, "1": 3}
    assert all(layer.lora_E.all() for layer in model)


@pytest.mark.parametrize(("steps", "deltaT"), [(3, 1), (4, 2)])
def test_a_budget_that_stays_until_the_last_step_comes_down_in_it(steps, deltaT):
    method = AdaLoRA(init_r=3, target_r=1, total_step=steps, tinit=2, deltaT=deltaT, target_modules=LAYERS)
    model = trained(method, steps - 1)
    assert method.ranks(model) == {"0": 3, "1": 3}
    assert sum(method.ranks(trained(method, 1, model)).values()) == 2


def test_exactly_so_many_stay_as_the_budget_has_also_where_scores_are_equal():
    """A layer that got no gradient, as an expert that no token was sent to, counts nothing; its scores are all 0."""
    method = AdaLoRA(init_r=3, target_r=2, total_step=4, target_modules=LAYERS)
    model = drawn(method.attach(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 6))))
    hooks = Hooks(model)
    for step in range(4):
        model[0](torch.ones(1, 5)).sum().backward()
        hooks.after_step(step)
    assert model[1].lora_A.grad is None
    assert sum(method.ranks(model).values()) == 4
    assert method.ranks(model)["0"] == 3


def test_what_was_taken_away_can_come_back_until_the_end():
    method = AdaLoRA(
        init_r=3, target_r=1, total_step=100, tinit=0, tfinal=0, deltaT=10, target_modules=LAYERS
    )
    model = trained(method, 61)
    gone = [~layer.lora_kept for layer in model]
    assert sum(int(mask.sum()) for mask in gone) > 0
    assert not any(layer.lora_E[mask].any() for layer, mask in zip(model, gone, strict=True))
    trained(method, 4, model)  # between two decisions λ grows again
    assert all(layer.lora_E[mask].all() for layer, mask in zip(model, gone, strict=True) if mask.any())


def test_the_strength_follows_the_rank_only_if_asked():
    x = torch.randn(3, 5)
    methods = [
        AdaLoRA(init_r=4, target_r=1, total_step=9, scale_by_rank=by, target_modules=("0",))
        for by in (False, True)
    ]
    models = [drawn(method.attach(nn.Sequential(nn.Linear(5, 4))).eval()) for method in methods]
    models[1].load_state_dict(models[0].state_dict())
    said = []
    for model in models:
        model[0].lora_kept.copy_(torch.tensor([True, False, False, True]))
        attached(model)["default"].parts[0].cut()
        lora = model(x) - nn.functional.linear(x, model[0].weight, model[0].bias)
        said.append(lora)
        merge(model)
        torch.testing.assert_close(model(x) - lora, nn.functional.linear(x, *_base(model)))
        unmerge(model)
    torch.testing.assert_close(said[1], 2 * said[0])  # r / rank = 4 / 2
    models[1][0].lora_kept.zero_()  # a layer may lose all of its ranks
    attached(models[1])["default"].parts[0].cut()
    assert torch.equal(models[1](x), nn.functional.linear(x, models[1][0].weight, models[1][0].bias))


def _base(model):
    base = vars(model[0])["_base"]
    return base["weight"], base["bias"]


def test_what_was_learned_of_the_ranks_is_saved_and_the_importance_is_not(tmp_path):
    method = AdaLoRA(init_r=3, target_r=1, total_step=20, target_modules=LAYERS)
    model = trained(method, 12)
    save(model, tmp_path)
    again = load(detach(copy.deepcopy(model)), tmp_path)
    assert method.ranks(again) == method.ranks(model)
    assert again.adalora_step == 12
    assert not again.lora_importance.any()
    assert model.lora_importance.all()
    assert IMPORTANCE not in model.state_dict()
    assert sum(method.ranks(trained(method, 8, again)).values()) == 2


@pytest.mark.parametrize("tfinal", [0, 5])
def test_a_loaded_one_that_knows_no_importance_keeps_the_ranks_that_were_given_out(tmp_path, tfinal):
    method = AdaLoRA(init_r=3, target_r=1, total_step=20, tfinal=tfinal, target_modules=LAYERS)
    model = trained(method, 20 - tfinal)
    model[0].lora_kept.copy_(torch.tensor([False, False, True]))
    model[1].lora_kept.copy_(torch.tensor([False, True, True]))
    save(model, tmp_path)
    again = trained(method, 1, load(detach(copy.deepcopy(model)), tmp_path))
    assert [layer.lora_kept.tolist() for layer in again] == [layer.lora_kept.tolist() for layer in model]


def test_a_training_that_was_interrupted_goes_on_bit_for_bit(tmp_path):
    base, examples = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 6)), [{"x": x} for x in torch.randn(12, 5)]
    method = AdaLoRA(init_r=3, target_r=1, total_step=8, tfinal=2, target_modules=LAYERS)
    how = {"steps": 8, "batch_size": 4, "lr": 0.05, "progress": False, "checkpoint": tmp_path}
    models, calls = [method.attach(copy.deepcopy(base)) for _ in range(3)], []

    def loss(model, batch):
        return model(batch["x"]).square().mean()

    def breaks(model, batch):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return loss(model, batch)

    fit(models[0], examples, loss=loss, **how)
    with pytest.warns(UserWarning, match="the training had 4 of total_step=8 steps"):
        assert fit(models[1], examples, loss=breaks, **how).interrupted
    fit(models[2], examples, loss=loss, resume=True, **how)
    assert differences(dict(models[0].named_buffers()), dict(models[2].named_buffers())) == []
    assert differences(dict(models[0].named_parameters()), dict(models[2].named_parameters())) == []
    assert sum(method.ranks(models[2]).values()) == 2


def test_two_of_one_kind_have_a_budget_each_and_one_that_is_off_is_left_alone():
    method = AdaLoRA(init_r=3, target_r=1, total_step=4, target_modules=LAYERS)
    model = method.attach(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 6)), name="one")
    trained(method, 4, method.attach(model, name="two"))
    kept = [
        sum(int(p.held(KEPT).sum()) for p in a.parts if hasattr(p, "held")) for a in attached(model).values()
    ]
    assert kept == [2, 2]
    before = picture(model)
    attached(model)["one"].trains = attached(model)["two"].trains = False
    method.after_step(model, 0)
    assert differences(before, picture(model)) == []
    assert method.penalty(model).item() == 0


# ---- a schedule that isn't lived through


def test_a_schedule_longer_than_the_training_is_named_when_it_ends():
    model = AdaLoRA(init_r=3, target_r=1, total_step=50, target_modules=LAYERS).attach(
        nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 6))
    )
    examples = [{"x": x} for x in torch.randn(8, 5)]
    with pytest.warns(
        UserWarning, match=r"AdaLoRA: the budget has come to 5 ranks, not to 2, .* 3 of total_step=50"
    ):
        fit(
            model,
            examples,
            steps=3,
            progress=False,
            loss=lambda model, batch: model(batch["x"]).square().mean(),
        )
    row = diagnose(model)["schedule"]
    assert (row.verdict, row.advice) == ("look", "train on, or give total_step=3")
    state = type("State", (), {"global_step": 0})()
    arguments = type("Arguments", (), {"fp16": False, "max_grad_norm": 1.0})()
    trainer = callback()
    trainer.on_train_begin(arguments, state, None, model=model)
    with pytest.warns(UserWarning, match="the training had 3 of total_step=50 steps"):
        trainer.on_train_end(arguments, state, None)


def test_a_budget_that_never_moved_is_named_by_the_diagnosis():
    method = AdaLoRA(init_r=3, target_r=1, total_step=3, target_modules=LAYERS)
    model = drawn(method.attach(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 6))))
    row = diagnose(model)["schedule"]
    assert row.verdict == "look"
    assert row.found == "the budget never moved from 6 ranks, for after_step was never called"
    assert "pefttutor.fit" in row.advice
    assert diagnose(trained(method, 3, model))["schedule"].verdict == "ok"


# ---- memory, the widget, and bad input


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_estimate_is_what_autograd_keeps(kind, dropout):
    names = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn",), "bert": ("query", "output.dense")}[kind]
    model, method = model_of(kind), AdaLoRA(
        init_r=4, target_r=2, total_step=9, target_modules=names, lora_dropout=dropout
    )  # fmt: skip
    options = {"batch_size": 2, "sequence_length": 24, "attention": "eager", "device": "cpu"}
    estimated = memory.estimate(model, method, **options)
    method.attach(model)
    assert memory.estimate(model, **options) == estimated
    with watch_saved(model.train()) as saved:
        model(**batch_of(kind, 2, 24)).loss.backward()
    assert estimated.trained == sum(trainable(model).values()) == method.count(model)
    layers = len(method.ranks(model))
    assert (
        estimated.adapter_weights == 3 * 4 * estimated.trained + 4 * layers + 8
    )  # Ī, Ū, what is kept, the count
    assert sum(estimated.activations.values()) == pytest.approx(saved.peak_bytes, rel=0.01)


def test_the_ranks_widget_sees_the_ranks():
    method = AdaLoRA(init_r=3, target_r=1, total_step=6, target_modules=LAYERS)
    model = trained(method, 6)
    seen = {name: int((found.sigma > 1e-6).sum()) for name, found in updates(model).items()}
    assert seen == method.ranks(model)
    assert sum(seen.values()) == 2


def test_what_it_refuses_leaves_the_model_as_it_was():
    for settings, words in (
        ({"init_r": 4, "target_r": 5}, "target_r is 5; it must be at most init_r, 4"),
        (
            {"total_step": 10, "tinit": 4, "tfinal": 6},
            r"total_step is 10; it must be more than tinit \+ tfinal, 10",
        ),
        ({"beta1": 1.0}, "beta1 is 1.0"),
        ({"deltaT": 0}, "deltaT is 0"),
        ({"orth_reg_weight": -1}, "orth_reg_weight is -1"),
        ({"squared_penalty": 2}, "squared_penalty is 2"),
    ):
        with pytest.raises(ValueError, match=words):
            AdaLoRA(**settings)
    model = nn.Sequential(nn.Linear(6, 4))
    before = picture(model)
    with pytest.raises(
        ValueError, match="total_step is None; AdaLoRA must know how many steps fit will take"
    ):
        AdaLoRA(init_r=2, target_r=1, target_modules=("0",)).attach(model)
    with pytest.raises(ValueError, match="init_r is 5, but '0' maps 6 to 4: init_r must be at most 4"):
        AdaLoRA(init_r=5, total_step=9, target_r=1, target_modules=("0",)).attach(model)
    assert differences(before, picture(model)) == []
