"""The record of a run, and its picture."""

from typing import Any

import pytest

from pefttutor.train import fit
from pefttutor.train.history import History
from tests.tiny import language_examples, llama


def recorded(**validation: float) -> History:
    history = History()
    for loss in (3.0, 2.0, 1.25):
        history.record(loss=loss, lr=1e-3, step_s=0.01)
    if validation:
        history.validation.append({"step": 3, **validation})
    return history


def test_fit_records_every_step() -> None:
    history = fit(llama(), language_examples(), steps=3)
    assert history.steps == [1, 2, 3]
    assert len(history.loss) == len(history.lr) == len(history.step_s) == 3
    assert all(0 < seconds < 60 for seconds in history.step_s)
    assert repr(history) == "History(3 steps)"
    assert [repr(History(steps=[1] * n)) for n in (0, 1)] == ["History(0 steps)", "History(1 step)"]
    assert repr(History(steps=[1], interrupted=True)) == "History(1 step, interrupted)"


def test_plot_draws_what_was_recorded() -> None:
    figure = recorded(loss=1.5, accuracy=0.75).plot()
    left, right = figure.axes
    assert list(left.lines[0].get_ydata()) == [3.0, 2.0, 1.25]
    assert list(left.lines[1].get_ydata()) == [1.5]
    assert list(right.lines[0].get_ydata()) == [75.0]
    assert (left.get_xlabel(), left.get_ylabel()) == ("step", "loss (nats)")
    assert right.get_ylabel() == "validation accuracy (%)"
    assert figure.alt == (
        "Training loss over 3 steps, from 3 to 1.25; validation loss 1.5 at the end, validation accuracy 75 %."
    )
    assert figure.get_facecolor() == (1.0, 1.0, 1.0, 1.0)


def test_plot_without_validation_shows_the_learning_rate_and_a_metric_alone_is_no_loss() -> None:
    for history in (recorded(), recorded(metric=0.5)):
        left, right = history.plot().axes
        assert len(left.lines) == 1
        assert list(right.lines[0].get_ydata()) == [1e-3] * 3


def test_plot_of_one_step() -> None:
    history = History()
    history.record(loss=2.0, lr=1e-3, step_s=0.01)
    assert history.plot().alt == "Training loss over 1 step, from 2 to 2."


def test_plot_of_nothing() -> None:
    with pytest.raises(ValueError, match="has no steps to draw"):
        History().plot()


def test_as_dict_and_back() -> None:
    history: Any = recorded(loss=1.5)
    assert History(**history.as_dict()) == history
