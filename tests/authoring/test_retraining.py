"""Tables that are out of date are named, trained by processes side by side, and go on where they were stopped."""

import json
import os

import pytest

from pefttutor.authoring import __main__ as command_line
from pefttutor.authoring.retraining import scripts, state

SCRIPT = """
import os
import time
from pathlib import Path

from pefttutor.authoring.tables import compare


def train(way, lr, seed):
    if seed == 1 and not Path(__file__).with_name("go").exists():
        os._exit(9)
    here = Path(__file__).with_name(f"process-{os.getpid()}")
    here.touch()
    for _ in range(6000):  # until another works beside this one
        if len(list(here.parent.glob("process-*"))) > 1:
            break
        time.sleep(0.02)
    else:
        raise TimeoutError("no second process within two minutes")
    return {"validation": 1 - abs(lr - 2), "test": lr / 3, "process": os.getpid()}


if __name__ == "__main__":
    compare(__file__, train, {(w,): (1, 3) for w in "ab"}, columns=["way"], rates=[1, 2, 3], seeds=range(3),
            search_seeds=[7, 8], model="m", tasks=["t"])
"""


@pytest.fixture
def lesson(data_folder):
    """A lesson whose script stops at its first test seed but one."""
    (data_folder / "lessons/99/try.py").write_text(SCRIPT)
    return data_folder / "lessons/99"


def rows(lesson):
    return [json.loads(line) for line in (lesson / "try.jsonl").read_text().splitlines()[1:]]


def test_a_stopped_table_is_named_and_goes_on(lesson, capsys):
    assert command_line.main(["tables"]) == 1
    assert "99/try: not trained yet (0 rows, an unknown time)" in capsys.readouterr().out
    assert command_line.main(["tables", "99", "--train"]) == 1
    assert "ended with status 1; run it again to go on" in capsys.readouterr().err
    before = rows(lesson)
    assert before
    assert state(scripts()[0]).why == "stopped before its end"
    (lesson / "go").touch()
    assert command_line.main(["tables", "--train"]) == 0
    after = rows(lesson)
    assert len(after) == 2 * (3 * 2 + 3)
    assert all(row in after for row in before)  # with the seconds and the process of then
    assert len(list(lesson.glob("process-*"))) >= 2
    assert os.getpid() not in {row["process"] for row in after}
    capsys.readouterr()
    assert command_line.main(["tables"]) == 0
    took = sum(row["seconds"] for row in after) / 60  # a process that must first be started may take long
    assert f"99/try: up to date (18 rows, {took:.0f} minutes of one core)" in capsys.readouterr().out


@pytest.mark.parametrize(("file", "what"), [("try.py", "script"), ("../../tasks/t/task.json", "task t")])
def test_what_a_table_was_made_with_is_named(lesson, file, what):
    from pefttutor.authoring.provenance import provenance

    header = provenance(lesson / "try.py", model="m", tasks=["t"], seeds=[0])
    (lesson / "try.jsonl").write_text(
        json.dumps(header) + "\n" + json.dumps({"seed": 0, "seconds": 90.0}) + "\n"
    )
    assert state(scripts()[0]) == state(scripts(["99/t"])[0])
    assert str(state(scripts()[0])) == "99/try: up to date (1 rows, 2 minutes of one core)"
    (lesson / file).write_text('{"fingerprint": "g"}')
    assert state(scripts()[0]).why == f"made with another {what}"


def test_an_unknown_table_and_an_odd_number_of_processes_are_refused(lesson, capsys, monkeypatch):
    assert command_line.main(["tables", "98"]) == 1
    assert "no table is called '98'; there are 99/try" in capsys.readouterr().err
    monkeypatch.setenv("PEFTTUTOR_PROCESSES", "two")
    assert command_line.main(["tables", "--train"]) == 1
