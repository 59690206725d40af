"""The learning rate of a step, and the examples it takes: functions of its number."""

import math

import pytest

from pefttutor.train import fit, lr_factor, step_indices
from tests.tiny import language_examples, llama


@pytest.mark.parametrize("schedule", ["linear", "constant", "cosine"])
def test_learning_rate_follows_its_closed_formula(schedule: str) -> None:
    steps, rising = 20, 5
    history = fit(llama(), language_examples(4), steps=steps, warmup=0.25, schedule=schedule, lr=0.01)
    for step, lr in enumerate(history.lr):
        p = (step - rising) / (steps - rising)
        after = {"linear": 1 - p, "constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * p))}[schedule]
        assert lr == pytest.approx(0.01 * ((step + 1) / 6 if step < rising else after))
    assert min(history.lr) > 0


def test_learning_rate_is_at_its_peak_without_warmup_and_for_a_single_step() -> None:
    assert lr_factor(0, 1, warmup=0.06, schedule="linear") == 1
    assert lr_factor(0, 100, warmup=0.0, schedule="cosine") == 1


def test_every_epoch_takes_each_example_once_in_another_order() -> None:
    epochs = [[i for step in range(3 * e, 3 * e + 3) for i in step_indices(step, 10, 4, 0)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]
    assert step_indices(0, 10, 4, 0) != step_indices(0, 10, 4, 1)
