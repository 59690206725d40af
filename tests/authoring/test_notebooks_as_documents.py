"""Every notebook of the series, read as a document; and its section on real models, when that is asked for."""

import re
from pathlib import Path

import pytest

from pefttutor.authoring.document import Document
from pefttutor.authoring.lint import lint
from pefttutor.authoring.store import run

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("**/*.ipynb"))
NOTEBOOKS = [path for path in NOTEBOOKS if ".ipynb_checkpoints" not in path.parts]
WITH_REAL_MODELS = [path for path in NOTEBOOKS if "PEFTTUTOR_REAL" in path.read_text(encoding="utf-8")]


def name(path):
    return path.stem


def test_there_are_lessons():
    assert [path.name for path in NOTEBOOKS if path.name.startswith("00_")] == ["00_start_here.ipynb"]
    numbers = [path.name.split("_")[0] for path in NOTEBOOKS]
    assert len(numbers) == len(set(numbers)), "two lessons have one number"
    assert {number[:2] for number in numbers} <= set(numbers), "an appendix without its lesson"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_it_is_a_lesson(path):
    assert "\n".join(map(str, lint(path))) == ""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_it_names_only_lessons_that_exist_or_are_planned(path):
    """A number in `lesson 13` or `notebook 13` is one of the series in the README."""
    series = set(re.findall(r"^\| (\d\d) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    words = "\n".join(cell.source for cell in Document(path).markdown)
    named = set(re.findall(r"\b(?:lesson|notebook)s? (\d\d)\b", words, re.IGNORECASE))
    assert named <= series


@pytest.mark.real
@pytest.mark.parametrize("path", WITH_REAL_MODELS, ids=name)
def test_its_section_on_real_models_runs(path):
    """What it prints is in the log with `pytest -rP`: these are the numbers that a learner gets."""
    for cell in run(path, real=True, timeout_s=2400).cells:
        shown = "".join(output.text for output in cell.get("outputs", []) if output.output_type == "stream")
        if "PEFTTUTOR_REAL" in cell.source or "real" in cell.id:
            print(shown)
