"""The record of a run, its picture, and who sees a bar."""

import sys
from typing import Any

import pytest

from pefttutor.train import fit, progress
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


def test_plot_of_nothing() -> None:
    with pytest.raises(ValueError, match="has no steps to draw"):
        History().plot()


class Terminal:
    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def leave_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither under test nor in CI, and no kernel. No fixture: pytest changes sys.stderr once more after those."""
    for name in ("PEFTTUTOR_PROGRESS", *progress._MACHINES, *progress._PEOPLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())


def test_a_terminal_is_a_person_but_not_under_test_or_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_alone(monkeypatch)
    assert progress.for_a_person()
    for name in ("CI", "PYTEST_VERSION"):
        with monkeypatch.context() as inner:
            inner.setenv(name, "1")
            assert not progress.for_a_person()
    monkeypatch.setattr(sys, "stderr", None)
    assert not progress.for_a_person()


def test_a_kernel_is_a_person_only_behind_a_front_end(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_alone(monkeypatch)
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert not progress.for_a_person()  # nbclient, nbconvert
    monkeypatch.setenv("JPY_SESSION_NAME", "lesson.ipynb")
    assert progress.for_a_person()
    monkeypatch.setenv("PYTEST_VERSION", "9")  # nbval
    assert not progress.for_a_person()
    monkeypatch.setenv("PEFTTUTOR_PROGRESS", "1")
    assert progress.for_a_person()
    monkeypatch.setenv("PEFTTUTOR_PROGRESS", "0")
    monkeypatch.delenv("PYTEST_VERSION")
    assert not progress.for_a_person()


def test_fit_is_silent_under_test_and_shows_a_bar_when_asked(capfd: pytest.CaptureFixture[str]) -> None:
    fit(llama(), language_examples(), steps=2)
    assert capfd.readouterr() == ("", "")
    fit(llama(), language_examples(), steps=2, progress=True)
    assert "/2" in capfd.readouterr().err


def test_as_dict_and_back() -> None:
    history: Any = recorded(loss=1.5)
    assert History(**history.as_dict()) == history
