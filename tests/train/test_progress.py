"""Who sees a bar: a person, and neither a test nor a machine."""

import sys

import pytest

from pefttutor.train import fit, progress
from tests.tiny import language_examples, llama


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
