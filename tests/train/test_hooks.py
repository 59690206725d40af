"""What methods have to say in a step: in order, once each, and of several attached at a time."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from pefttutor import (
    AutoFreeze,
    ChildTuningF,
    DiffPruning,
    LoRA,
    SparseFineTuning,
    switch,
    trainable,
)
from pefttutor.train import fit
from pefttutor.train.hooks import Hooks
from tests.cases import moved
from tests.pictures import differences, tensors
from tests.tiny import language_examples, llama, weights


class Recorder:
    """All hooks; notes when each is called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def penalty(self, model: nn.Module) -> torch.Tensor:
        self.calls.append(("penalty", None))
        return sum((p**2).sum() for p in model.parameters() if p.requires_grad)

    def after_backward(self, model: nn.Module, step: int) -> None:
        self.calls.append(("after_backward", step))

    def after_step(self, model: nn.Module, step: int) -> None:
        assert any(p.grad is not None for p in model.parameters())  # AdaLoRA's budget reads them
        self.calls.append(("after_step", step))

    def optimizer(self, model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        self.calls.append(("optimizer", (lr, weight_decay)))
        low, high = list(model.parameters())[:3], list(model.parameters())[3:]
        return torch.optim.SGD([{"params": low, "lr": lr}, {"params": high, "lr": 4 * lr}])


def test_hooks_are_called_in_order_once_a_step() -> None:
    method = Recorder()
    fit(
        llama(),
        language_examples(8),
        method=method,
        steps=2,
        batch_size=2,
        accumulate=2,
        lr=0.1,
        weight_decay=0.3,
    )
    a_step = ["penalty", "after_backward", "after_step"]
    assert [name for name, _ in method.calls] == ["optimizer", *a_step, *a_step]
    assert method.calls[0][1] == (0.1, 0.3)
    assert [value for name, value in method.calls if name == "after_step"] == [0, 1]


def test_the_penalty_adds_its_gradient_and_is_not_in_the_recorded_loss() -> None:
    class Pull:
        def penalty(self, model: nn.Module) -> torch.Tensor:
            return 100 * model.model.norm.weight.square().sum()

    class Look(Pull):
        def after_backward(self, model: nn.Module, step: int) -> None:
            seen.append(model.model.norm.weight.grad.clone())

    class LookOnly:
        after_backward = Look.after_backward

    seen: list[torch.Tensor] = []
    model = llama()
    weight = model.model.norm.weight.detach().clone()
    data = language_examples(4)
    losses = [fit(copy.deepcopy(model), data, method=m, steps=1).loss[0] for m in (Look(), LookOnly())]
    assert losses[0] == losses[1]
    assert torch.allclose(seen[0] - seen[1], 200 * weight, atol=1e-3)


def test_a_mask_after_backward_and_before_clipping_keeps_masked_weights() -> None:
    class Mask:
        def after_backward(self, model: nn.Module, step: int) -> None:
            for name, p in model.named_parameters():
                if "layers.0" in name:
                    p.grad.zero_()

    model = llama()
    before = weights(model)
    fit(model, language_examples(), method=Mask(), steps=3, weight_decay=0)
    for name, value in weights(model).items():
        assert torch.equal(value, before[name]) == ("layers.0" in name)


def test_learning_rates_of_a_methods_groups_keep_their_ratio() -> None:
    rates = []

    class Method(Recorder):
        def after_step(self, model: nn.Module, step: int) -> None:
            rates.append([group["lr"] for group in optimizers[0].param_groups])

        def optimizer(self, model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
            optimizers.append(super().optimizer(model, lr=lr, weight_decay=weight_decay))
            return optimizers[0]

    optimizers: list[torch.optim.Optimizer] = []
    fit(llama(), language_examples(4), method=Method(), steps=4, warmup=0)
    assert all(high == pytest.approx(4 * low) for low, high in rates)
    assert rates[0][0] > rates[-1][0]


# ---- several attached


@dataclass(frozen=True)
class Noting:
    """A method that trains one weight and notes its hooks in a list of its class."""

    weight: str
    strength: float = 0.0
    calls = []  # noqa: RUF012 (one for all)

    def attach(self, model: nn.Module, *, name: str = "default") -> nn.Module:
        from pefttutor.method import attaching
        from pefttutor.parts.freezing import train_fully

        with attaching(model, self, name) as new:
            for part in train_fully(model, [self.weight]):
                new.add(part)
        return model

    def penalty(self, model: nn.Module) -> torch.Tensor:
        self.calls.append(("penalty", self.weight))
        return self.strength * model.get_parameter(self.weight).sum()

    def after_backward(self, model: nn.Module, step: int) -> None:
        self.calls.append(("after_backward", self.weight))

    def after_step(self, model: nn.Module, step: int) -> None:
        self.calls.append(("after_step", self.weight))


NORM, OTHER = "model.norm.weight", "model.layers.0.input_layernorm.weight"


def test_all_that_learn_are_asked_in_the_order_of_attaching_and_those_that_do_not_are_not() -> None:
    model = llama()
    for weight, name in ((NORM, "one"), (OTHER, "two"), ("model.layers.1.input_layernorm.weight", "three")):
        Noting(weight).attach(model, name=name)
    switch(model, "one", "two", "three", train=("one", "two"))
    Noting.calls.clear()
    fit(model, language_examples(4), steps=1)
    expected = [
        (hook, weight) for hook in ("penalty", "after_backward", "after_step") for weight in (NORM, OTHER)
    ]
    assert Noting.calls == expected
    switch(model, "two")
    Noting.calls.clear()
    fit(model, language_examples(4), steps=1)
    assert {weight for _, weight in Noting.calls} == {OTHER}


def test_penalties_add_up() -> None:
    model = llama()
    Noting(NORM, 2.0).attach(model, name="one")
    Noting(OTHER, 3.0).attach(model, name="two")
    Hooks(model).penalty().backward()
    assert model.get_parameter(NORM).grad.eq(2).all()
    assert model.get_parameter(OTHER).grad.eq(3).all()
    nothing = Hooks(llama()).penalty()
    assert nothing.item() == 0
    nothing.backward()


def test_a_method_that_is_given_is_asked_alone() -> None:
    model = llama()
    Noting(NORM).attach(model)
    assert Hooks(model, Recorder()).having("penalty")[0].__class__ is Recorder
    assert [m.weight for m in Hooks(model).methods] == [NORM]
    LoRA(r=2).attach(model, name="low")
    assert Hooks(model, LoRA(r=2)).changes_gradients is False
    assert Hooks(model).changes_gradients


def test_two_equal_methods_are_one_whose_hooks_see_all_that_they_train() -> None:
    """Child-Tuning F masks what either has attached, once."""
    model = llama()
    method = ChildTuningF(p_F=0.5)
    method.attach(model, name="one")
    assert len(Hooks(model).methods) == 1
    LoRA(r=2).attach(model, name="low")
    LoRA(r=2).attach(model, name="again")
    assert [type(m).__name__ for m in Hooks(model).methods] == ["ChildTuningF", "LoRA"]


def test_a_hook_that_masks_gradients_leaves_other_methods_alone() -> None:
    model = llama()
    ChildTuningF(p_F=0.5).attach(model, name="child")
    moved(LoRA(r=2).attach(model, name="low"))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    Hooks(model).after_backward(0)
    assert all(p.grad.eq(1).all() for n, p in model.named_parameters() if "lora_" in n)
    assert any(p.grad.eq(0).any() for n, p in model.named_parameters() if "lora_" not in n)


def test_freezing_blocks_leaves_other_methods_alone() -> None:
    model = llama()
    method = AutoFreeze(interval=100)
    method.attach(model, name="auto")
    LoRA(r=2).attach(model, name="low")
    model.get_buffer("autofreeze_frozen@auto").fill_(1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    Hooks(model).after_backward(0)
    trains = trainable(model)
    assert "model.layers.0.self_attn.q_proj.weight" not in trains
    assert "model.layers.0.self_attn.q_proj.lora_A@low" in trains


def test_two_that_bring_an_optimizer_are_refused_unless_one_learns_at_a_time() -> None:
    model = llama()
    DiffPruning().attach(model, name="one")
    DiffPruning(l0_weight=1.0).attach(model, name="two")
    with pytest.raises(ValueError, match=r"DiffPruning and DiffPruning each bring an optimizer.*train=\("):
        fit(model, language_examples(4), steps=1)
    before = {n: p for n, p in tensors(model).items() if "@one" in n}
    fit(switch(model, "one", "two", train=("two",)), language_examples(4), steps=1)
    assert differences(before, {n: p for n, p in tensors(model).items() if "@one" in n}) == []


def test_chosen_entries_are_in_their_weights_before_a_method_looks() -> None:
    seen = []

    class Look(SparseFineTuning):
        def after_step(self, model: nn.Module, step: int) -> None:
            weight = model.get_parameter(NORM).detach()
            values = model.model.norm.get_parameter("weight_values@bits").detach()
            seen.append(torch.equal(weight[:2], values))

    model = Look().attach(llama(), {NORM: torch.tensor([0, 1])}, name="bits")
    fit(model, language_examples(4), steps=2, lr=0.1)
    assert seen == [True, True]


class Own(DiffPruning):
    """Somebody's variant of a method."""


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (Own(), r"method=Own\(…\) isn't attached"),
        ([LoRA()], "method=list has nothing to say"),
        (ChildTuningF(), r"method=ChildTuningF\(…\) isn't attached to this model.*Attach it first"),
        (LoRA(), r"method=LoRA\(…\) isn't attached"),
        (DiffPruning(), r"method=DiffPruning\(…\) isn't attached"),
        (LoRA, "method=LoRA has nothing to say in a training step; expected an object"),
        (Recorder, "method=Recorder has nothing to say"),
        ("LoRA", "method=str has nothing to say.*penalty, after_backward, after_step, optimizer, unfinished"),
        (object(), "method=object has nothing to say"),
    ],
)
def test_a_method_that_would_do_nothing_is_refused(method: Any, says: str) -> None:
    """All of the model would have been trained, and nobody told."""
    model = llama()
    before = weights(model)
    with pytest.raises(ValueError, match=says):
        fit(model, language_examples(4), method=method, steps=1)
    assert all(torch.equal(before[name], now) for name, now in weights(model).items())


def test_an_attached_method_may_be_named_as_well() -> None:
    method = LoRA(r=2)
    model = method.attach(llama())
    assert [type(m).__name__ for m in Hooks(model, method).methods] == ["LoRA"]
    with pytest.raises(ValueError, match="isn't attached"):
        Hooks(model, LoRA(r=3))
