"""What stands around the steps: evaluation, and stopping and going on, bit for bit."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pefttutor.train import fit
from tests.tiny import language_examples, llama, weights


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_validation_every_so_many_steps_after_each_epoch_and_at_the_end() -> None:
    data = language_examples(8)

    def steps_of(**settings: Any) -> list[float]:
        history = fit(llama(), data, validation=data[:3], batch_size=4, **settings)
        return [entry["step"] for entry in history.validation]

    assert steps_of(steps=5) == [2, 4, 5]
    assert steps_of(steps=5, evaluate_every=3) == [3, 5]
    assert steps_of(epochs=2) == [2, 4]


def test_metric_is_called_in_eval_mode_and_cannot_disturb_training() -> None:
    def metric(model: nn.Module) -> float:
        assert not model.training
        return torch.rand(()).item()

    settings: dict[str, Any] = {"steps": 4, "evaluate_every": 1}
    data = language_examples()
    with_metric = fit(llama(attention_dropout=0.4), data, metric=metric, **settings)
    without = fit(llama(attention_dropout=0.4), data, **settings)
    assert with_metric.loss == without.loss
    assert [set(entry) for entry in with_metric.validation] == [{"step", "metric"}] * 4
    named = fit(llama(), data, metric=lambda model: {"perplexity": 3.0}, steps=1)
    assert named.validation == [{"step": 1, "perplexity": 3.0}]


class StopAt:
    """Raises KeyboardInterrupt from a place inside step `at`, counted from 0."""

    def __init__(self, at: int, place: str) -> None:
        self.at, self.place = at, place

    def after_backward(self, model: nn.Module, step: int) -> None:
        if self.place == "signal in the update" and step == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        if self.place == "after_backward" and step == self.at:
            raise KeyboardInterrupt


def stopping_loss(at: int, place: str) -> Any:
    calls: list[None] = []
    last = 2 * at - at // 4 + 2  # two parts a step, but one in the fourth of each epoch of 20

    def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        value = model(**batch).loss  # draws dropout first, so that the generator has moved on
        if model.training:
            calls.append(None)
            if len(calls) == last and place == "loss":
                raise KeyboardInterrupt
            if len(calls) == last and place == "signal in the loss":
                os.kill(os.getpid(), signal.SIGINT)
        return value

    return loss


RUN: dict[str, Any] = {
    "steps": 9, "batch_size": 3, "accumulate": 2, "lr": 1e-2, "schedule": "cosine", "evaluate_every": 4,
}  # fmt: skip
DROPOUT: dict[str, Any] = {"attention_dropout": 0.3}


@pytest.fixture(scope="module")
def whole_run() -> tuple[Any, dict[str, torch.Tensor]]:
    model = llama(**DROPOUT)
    return fit(model, language_examples(20), validation=language_examples(5, seed=9), **RUN), weights(model)


@pytest.mark.parametrize("place", ["loss", "signal in the loss", "after_backward", "signal in the update"])
@pytest.mark.parametrize("at", [0, 4, 8])
def test_an_interrupted_run_goes_on_bit_for_bit(
    tmp_path: Path, whole_run: tuple[Any, dict[str, torch.Tensor]], place: str, at: int
) -> None:
    data, validation = language_examples(20), language_examples(5, seed=9)
    settings: dict[str, Any] = {**RUN, "validation": validation, "checkpoint": tmp_path / "run"}
    model = llama(**DROPOUT)
    first = fit(model, data, method=StopAt(at, place), loss=stopping_loss(at, place), **settings)
    assert first.interrupted
    assert not model.training
    assert len(first.steps) == at + (place == "signal in the update")  # that step is finished first
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["fit.safetensors"]

    fresh = llama(**DROPOUT)
    second = fit(fresh, data, resume=True, **settings)
    expected, expected_weights = whole_run
    assert not second.interrupted
    assert second.steps == expected.steps
    assert second.loss == expected.loss
    assert second.lr == expected.lr
    assert [e["step"] for e in second.validation] == [e["step"] for e in expected.validation]
    assert [e["loss"] for e in second.validation] == [e["loss"] for e in expected.validation]
    assert equal(weights(fresh), expected_weights)


def test_interruption_during_evaluation_repeats_the_evaluation(tmp_path: Path, whole_run: Any) -> None:
    data, validation, asked = language_examples(20), language_examples(5, seed=9), []

    def metric(model: nn.Module) -> dict[str, float]:
        asked.append(None)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return {}

    settings: dict[str, Any] = {**RUN, "validation": validation, "checkpoint": tmp_path, "metric": metric}
    first = fit(llama(**DROPOUT), data, **settings)
    assert (len(first.steps), first.validation) == (4, [])
    fresh = llama(**DROPOUT)
    second = fit(fresh, data, resume=True, **settings)
    assert second.validation == whole_run[0].validation
    assert equal(weights(fresh), whole_run[1])


def test_interruption_without_a_checkpoint_returns_the_record() -> None:
    history = fit(
        llama(), language_examples(), loss=stopping_loss(1, "loss"), steps=5, accumulate=2, batch_size=2
    )
    assert history.interrupted
    assert len(history.steps) == 1


def test_the_usual_handler_of_ctrl_c_is_back_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT)
    fit(llama(), language_examples(), steps=2)
    assert signal.getsignal(signal.SIGINT) is before


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    model, data = llama(), language_examples()
    history = fit(model, data, steps=3, checkpoint=tmp_path)
    fresh = llama()
    again = fit(fresh, data, steps=3, checkpoint=tmp_path, resume=True)
    assert again.loss == history.loss
    assert equal(weights(fresh), weights(model))
