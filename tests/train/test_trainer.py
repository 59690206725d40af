"""The callback inside transformers.Trainer does what fit does."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from pefttutor import LoRA, LoRAPlus
from pefttutor.data.batches import collate
from pefttutor.train import callback, fit, lr_factor, step_indices
from tests.tiny import language_examples, llama, weights

STEPS, BATCH, LR = 5, 4, 1e-2


class InOrder(Trainer):
    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def train(
    model: Any,
    method: Any,
    folder: Path,
    *,
    accumulate: int = 1,
    max_grad_norm: float = 0.3,
    use: bool = True,
    own_optimizer: bool = True,
) -> tuple[Any, TrainingArguments]:
    """Train with the Trainer on the examples that fit takes, in its order; returns the callback and the arguments."""
    data = language_examples(STEPS * BATCH * accumulate)
    per_step = BATCH * accumulate
    ordered = [data[i] for step in range(STEPS) for i in step_indices(step, len(data), per_step, 0)]
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=BATCH, gradient_accumulation_steps=accumulate,
        max_steps=STEPS, max_grad_norm=max_grad_norm, report_to=[], save_strategy="no", logging_strategy="no",
        use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.01
    )
    if own_optimizer and hasattr(method, "optimizer"):
        optimizer = method.optimizer(model, lr=LR, weight_decay=0.01)
    schedule = LambdaLR(optimizer, lambda step: lr_factor(step, STEPS, warmup=0.4, schedule="linear"))
    hooks = callback(method)
    trainer = InOrder(
        model=model, args=args, train_dataset=ordered, data_collator=collate, optimizers=(optimizer, schedule),
        callbacks=[hooks] if use else [],
    )  # fmt: skip
    trainer.train()
    return hooks, args


def by_fit(
    model: Any, method: Any, *, accumulate: int = 1, max_grad_norm: float = 0.3
) -> dict[str, torch.Tensor]:
    data = language_examples(STEPS * BATCH * accumulate)
    fit(
        model, data, method=method, steps=STEPS, batch_size=BATCH, accumulate=accumulate, lr=LR, warmup=0.4,
        max_grad_norm=max_grad_norm,
    )  # fmt: skip
    return weights(model)


def difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return max((left[name] - right[name]).abs().max().item() for name in left)


class Everything:
    """A penalty, a mask and a change after the step, all of which show in the weights."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def penalty(self, model: nn.Module) -> torch.Tensor:
        return 3 * sum(p.square().sum() for p in model.parameters() if p.requires_grad)

    def after_backward(self, model: nn.Module, step: int) -> None:
        model.model.layers[0].mlp.up_proj.weight.grad[: step + 1] = 0

    def after_step(self, model: nn.Module, step: int) -> None:
        self.steps.append(step)
        with torch.no_grad():
            model.model.norm.weight.mul_(1 + 0.01 * step)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_same_weights_as_fit_with_every_hook_and_clipping(tmp_path: Path, accumulate: int) -> None:
    model = llama()
    other, without = copy.deepcopy(model), copy.deepcopy(model)
    method = Everything()
    expected = by_fit(model, Everything(), accumulate=accumulate)
    hooks, args = train(other, method, tmp_path, accumulate=accumulate)
    assert difference(weights(other), expected) < 2e-5
    assert method.steps == list(range(STEPS))
    assert (args.max_grad_norm, hooks.max_grad_norm) == (0.3, 0.0)  # given back
    train(without, method, tmp_path, accumulate=accumulate, use=False)
    assert difference(weights(without), expected) > 1e-3  # the hooks do matter


def test_same_weights_as_fit_for_lora_and_a_method_without_hooks(tmp_path: Path) -> None:
    method = LoRA(r=2)
    model = method.attach(llama())
    other = copy.deepcopy(model)
    before = weights(model)
    expected = by_fit(model, method)
    train(other, method, tmp_path)
    assert difference(weights(other), expected) < 1e-5
    assert difference(before, expected) > 1e-3


def test_a_methods_own_optimizer_goes_to_the_trainer(tmp_path: Path) -> None:
    class Sgd:
        def optimizer(self, model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
            return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)

    model = llama()
    other = copy.deepcopy(model)
    expected = by_fit(model, Sgd())
    train(other, Sgd(), tmp_path)
    assert difference(weights(other), expected) < 1e-6


@pytest.mark.parametrize("ratio", [1, 4])
def test_another_optimizer_than_the_methods_own_is_named(tmp_path: Path, ratio: float) -> None:
    method = LoRAPlus(r=2, loraplus_lr_ratio=ratio)
    model = method.attach(llama())
    _, args = train(model, method, tmp_path)  # a warning would be an error here
    named = pytest.warns(
        UserWarning, match="LoRAPlus brings an optimizer of its own, and this Trainer has another"
    )
    with contextlib.nullcontext() if ratio == 1 else named:  # with 1 it is the very same
        train(model, method, tmp_path, own_optimizer=False)
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    with pytest.warns(UserWarning, match="this Trainer has another: give it optimizers="):
        callback().on_train_begin(args, None, None, model=model, optimizer=sgd)


def test_a_run_that_broke_off_does_not_lose_the_clipping(tmp_path: Path) -> None:
    class Args:
        fp16, max_grad_norm = False, 0.3

    hooks, args = callback(Everything()), Args()
    hooks.on_train_begin(args, None, None, model=llama())
    hooks.on_train_begin(args, None, None, model=llama())  # no on_train_end between
    assert (hooks.max_grad_norm, args.max_grad_norm) == (0.3, 0.0)
    hooks.on_train_end(args, None, None)
    assert args.max_grad_norm == 0.3


def test_fp16_is_refused_for_methods_that_change_gradients() -> None:
    class Args:
        fp16, max_grad_norm = True, 1.0

    with pytest.raises(ValueError, match=r"Everything changes gradients, which fp16 scales: use bf16=True"):
        callback(Everything()).on_train_begin(Args(), None, None, model=llama())
    callback().on_train_begin(Args(), None, None, model=LoRA(r=2).attach(llama()))
