"""What stands around the steps: evaluation, and stopping and going on, bit for bit."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pefttutor.lowrank import LoRA
from pefttutor.train import fit
from tests.tiny import language_examples, llama, rows_of, tiny_batch, tiny_model, weights


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


# ---- buffers, which move in the middle of a step


class Count(nn.Module):
    """Counts its calls in training, in place and by a new tensor."""

    seen: torch.Tensor
    anew: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("seen", "anew"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1
            self.anew = self.anew + 1
        return x


def net(method: Any = None) -> Any:
    """A network with BatchNorm and counters."""
    model: Any = tiny_model("net")
    model.enter = nn.Sequential(model.enter, Count())
    return method.attach(model) if method else model.requires_grad_(True)


def net_loss(at: int | None = None, error: Any = KeyboardInterrupt) -> Any:
    """Cross-entropy that breaks off step `at`, of two parts a step, behind its second forward."""
    calls: list[None] = []

    def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        value = F.cross_entropy(model(batch["x"]), batch["labels"])
        calls.extend([None] * model.training)
        if at is not None and model.training and len(calls) == 2 * at + 2:
            if error is FloatingPointError:
                return value * float("nan")
            raise error
        return value

    return loss


NET: dict[str, Any] = {"steps": 6, "batch_size": 3, "accumulate": 2, "lr": 1e-2, "evaluate_every": 2}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of parameters and buffers."""
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore:.*is changed by training, and no method saves it")
@pytest.mark.parametrize("fresh", [True, False], ids=["a fresh model", "the same model"])
@pytest.mark.parametrize("method", [None, LoRA(r=2, target_modules=("up",))], ids=["full", "LoRA"])
@pytest.mark.parametrize("at", [0, 2, 5])
def test_what_a_broken_off_step_has_counted_is_not_counted_again(
    tmp_path: Path, at: int, method: Any, fresh: bool
) -> None:
    data = rows_of(tiny_batch("net")) * 4
    settings: dict[str, Any] = {**NET, "validation": data[:3], "checkpoint": tmp_path}
    expected = net(method)
    fit(expected, data, loss=net_loss(), **NET)
    model = net(method)
    first = fit(model, data, loss=net_loss(at), **settings)
    assert first.interrupted
    assert model.enter[1].seen == model.enter[1].anew == 2 * at
    model = net(method) if fresh else model
    fit(model, data, loss=net_loss(), resume=True, **settings)
    assert model.enter[1].seen == 12
    assert equal(state(model), state(expected))


@pytest.mark.parametrize("error", [FloatingPointError, MemoryError])
def test_an_error_in_a_step_leaves_the_buffers_of_the_step_before(error: Any) -> None:
    data = rows_of(tiny_batch("net")) * 4
    expected, model = net(), net()
    fit(expected, data, loss=net_loss(), **{**NET, "steps": 3, "schedule": "constant", "warmup": 0})
    held = model.enter[1].seen
    with pytest.raises(error):
        fit(model, data, loss=net_loss(3, error), **{**NET, "schedule": "constant", "warmup": 0})
    assert equal(state(model), state(expected))
    assert model.enter[1].seen is held  # who holds the buffer sees it


def test_what_an_evaluation_has_changed_counts_once(tmp_path: Path) -> None:
    def metric(model: Any) -> float:
        model.enter[1].seen += 100
        if stop:
            stop.pop()
            raise KeyboardInterrupt
        return 0.0

    data, stop = rows_of(tiny_batch("net")) * 4, [True]
    settings: dict[str, Any] = {**NET, "metric": metric, "checkpoint": tmp_path}
    model = net()
    fit(model, data, loss=net_loss(), **settings)
    assert model.enter[1].seen == 4
    fit(
        model, data, loss=net_loss(1), resume=True, **settings
    )  # breaks off the fourth step, behind one evaluation
    assert model.enter[1].seen == 106
    fit(model, data, loss=net_loss(), resume=True, **settings)
    assert model.enter[1].seen == 312
