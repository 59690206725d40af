"""What is said to train and doesn't: a warning in the first step, which names it and the likely cause."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from pefttutor import (
    BitFit,
    LoRA,
    SparseFineTuning,
)
from pefttutor.train import fit
from pefttutor.train.watch import Watch


class Net(nn.Module):
    """It calls one layer, has one that it doesn't call, and a buffer that it changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.called, self.forgotten = nn.Linear(2, 2), nn.Linear(2, 2)
        self.register_buffer("count", torch.zeros(()))
        self.gradient_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.counts:
            self.count.add_(1)
        return self.called(x)

    counts = False


ROWS = [{"x": torch.ones(2), "labels": torch.tensor(i % 2)} for i in range(4)]


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])


def warned(model: nn.Module, **settings: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, ROWS, **{"steps": 2, "loss": loss, **settings})
    return [str(warning.message) for warning in caught]


def test_what_gets_no_gradient_is_named_once_and_training_goes_on() -> None:
    model = SparseFineTuning().attach(
        Net(), {"called.weight": torch.tensor([0]), "forgotten.weight": torch.tensor([1, 2])}
    )
    (message,) = warned(model)
    assert re.search(
        r"'forgotten\.weight_values': should train and got no gradient in the first step\. Likely: noth",
        message,
    )


def test_a_layer_that_is_never_called_is_named_as_the_cause() -> None:
    (message,) = warned(LoRA(r=1, target_modules=("called", "forgotten")).attach(Net()))
    assert "'forgotten.lora_A', 'forgotten.lora_B': should train and got no gradient" in message
    assert "Likely: 'forgotten' is never called" in message


def test_under_checkpointing_that_is_the_likely_cause() -> None:
    model = BitFit(target_modules=("forgotten", "called")).attach(Net())
    model.gradient_checkpointing = True
    (message,) = warned(model)
    assert "use_reentrant=True a block gets gradients only if its input does" in message


def test_a_long_list_is_cut() -> None:
    model = Net()
    model.more = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    (message,) = warned(BitFit().attach(model))
    assert re.match(r"'forgotten\.bias', 'more\.0\.bias', 'more\.1\.bias' and 1 more: ", message)


def test_a_half_that_cannot_move_by_such_a_step_is_named_and_one_that_can_is_not() -> None:
    model = BitFit(target_modules=("called",)).attach(Net().bfloat16())
    model.called.bias.data.fill_(300.0)
    rows = [{**row, "x": row["x"].bfloat16()} for row in ROWS]
    with pytest.warns(UserWarning, match=r"'called\.bias': can't move\. Likely: .*torch\.bfloat16: keep"):
        fit(model, rows, steps=1, lr=1e-3, loss=loss)
    model.called.bias.data.fill_(0.01)
    fit(model, rows, steps=1, lr=1e-3, loss=loss)


def test_a_buffer_that_training_changes_and_nobody_saves_is_named() -> None:
    model = BitFit(target_modules=("called",)).attach(Net())
    model.counts = True
    (message,) = warned(model)
    assert re.search(
        r"'count': is changed by training, and no method saves it\. Likely: name the module", message
    )
    plain = Net().requires_grad_(True)
    plain.forgotten.requires_grad_(False)
    plain.counts = True
    assert warned(plain) == []  # full fine-tuning: the model is saved as a whole


def test_it_looks_at_the_first_step_only() -> None:
    model = LoRA(r=1, target_modules=("called",)).attach(Net())
    watch = Watch(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    watch.after_backward({})
    watch.after_step()
    for p in model.parameters():
        p.grad = None
    watch.after_backward({})
    watch.after_step()
