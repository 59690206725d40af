"""Lint, third part: what the learner does. Stub, check, hints and solution of each exercise; self-check questions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pefttutor.authoring.document import Document, Problem

EXERCISES = range(2, 5)
SELF_CHECK_QUESTIONS = 3

_CHECK = re.compile(
    r"^(?P<to>\w+)\s*=\s*check\.ex(?P<lesson>\d\d)_(?P<nth>\d+)\((?P<of>\w+)\)\s*$", re.MULTILINE
)
_ANY_CHECK = re.compile(r"\bcheck\.ex\w+")
_STUB = re.compile(r"""raise NotImplementedError\(\s*["']exercise (\d\d)\.(\d+)["']\s*\)""")
_DETAILS = re.compile(r"<details\b([^>]*)>\s*<summary>(.*?)</summary>", re.DOTALL | re.IGNORECASE)


def exercises(document: Document) -> Iterator[Problem]:
    """Two to four exercises, each with its stub right before its check and its hints right after.

    They are numbered 1…n; an appendix may have some, too, which go on from its lesson's and from earlier appendices'.
    """
    if document.number is None and not document.appendix:
        return
    lesson, before = document.path.name[:2], 0
    checks = _checks(document)
    if document.appendix:
        paths = document.path.parent.glob(f"{lesson}*.ipynb")
        before = sum(len(_checks(Document(path))) for path in paths if path.name < document.path.name)
    elif len(checks) not in EXERCISES:
        what = f"{len(checks)} exercise checks, expected {EXERCISES.start} to {EXERCISES.stop - 1}"
        yield document.problem("file", "exercises", what)
    for nth, (i, cell) in enumerate(checks, start=before + 1):
        match, number = _CHECK.search(cell.source), f"{lesson}.{nth}"
        if (
            match is None
            or (match["lesson"], match["nth"]) != (number[:2], number[3:])
            or match["to"] != match["of"]
        ):
            what = f"the check must read `name = check.ex{number.replace('.', '_')}(name)`"
            yield document.problem(cell, "exercise-check", what)
            continue
        yield from _stub(document, i, number, match["to"])
        yield from _help(document, i, number)


def _checks(document: Document) -> list[tuple[int, Any]]:
    """(place among the cells, cell) of every exercise's check."""
    return [(i, cell) for i, cell in enumerate(document.cells) if _is_check(cell)]


def _is_check(cell: Any) -> bool:
    return cell.cell_type == "code" and _ANY_CHECK.search(cell.source) is not None


def _stub(document: Document, check_at: int, number: str, name: str) -> Iterator[Problem]:
    """The code cell before the check defines the name, and only that."""
    before = [cell for cell in document.cells[:check_at] if cell.cell_type == "code"]
    stub = before[-1].source if before else ""
    if number not in {".".join(groups) for groups in _STUB.findall(stub)}:
        what = (
            f'the code cell before it must be the stub, with `raise NotImplementedError("exercise {number}")`'
        )
        yield document.problem(document.cells[check_at], "exercise-stub", what)
    elif not re.search(rf"^(def|class) {name}\b", stub, re.MULTILINE):
        yield document.problem(document.cells[check_at], "exercise-stub", f"the stub doesn't define {name}")
    text = next((c.source for c in reversed(document.cells[:check_at]) if c.cell_type == "markdown"), "")
    if number not in text or not re.search(r"\bmin(utes?)?\b", text):
        what = f"the text before the stub must name exercise {number}, its difficulty and its minutes"
        yield document.problem(document.cells[check_at], "exercise-text", what)


def _help(document: Document, check_at: int, number: str) -> Iterator[Problem]:
    """The text right after the check: hint, second hint, solution, each collapsed."""
    after: list[str] = []
    for cell in document.cells[check_at + 1 :]:
        if cell.cell_type != "markdown" or "<details" not in cell.source:
            break
        after.append(cell.source)
    summaries = [summary.lower() for _, summary in _DETAILS.findall("\n".join(after))]
    hints, solutions = (sum(word in s for s in summaries) for word in ("hint", "solution"))
    if hints < 2 or solutions < 1:
        what = (
            f"right after check {number}: {hints} collapsed hints and {solutions} solutions, expected 2 and 1"
        )
        yield document.problem(document.cells[check_at], "exercise-help", what)


def collapsed(document: Document) -> Iterator[Problem]:
    """What the learner should find out is closed, and what is opened is also ended."""
    for cell in document.markdown:
        opened, closed = cell.source.count("<details"), cell.source.count("</details>")
        if opened != closed:
            yield document.problem(cell, "details", f"{opened} <details> but {closed} </details>")
        for attributes, summary in _DETAILS.findall(cell.source):
            if re.search(r"\bopen\b", attributes):
                yield document.problem(
                    cell, "details", f"{summary.strip()!r} is open from the start; remove `open`"
                )
        stub_free = re.sub(r"<details.*?</details>", "", cell.source, flags=re.DOTALL)
        if re.search(r"^#+ .*solution", stub_free, re.MULTILINE | re.IGNORECASE):
            yield document.problem(cell, "details", "a solution that isn't collapsed; put it into <details>")


def self_check(document: Document) -> Iterator[Problem]:
    """Three questions with collapsed answers after the summary."""
    summary = [
        i for i, cell in enumerate(document.cells) if re.search(r"^##+ .*summary", cell.source, re.I | re.M)
    ]
    if not summary:
        return  # lesson.parts says so
    after = "\n".join(cell.source for cell in document.cells[summary[-1] :] if cell.cell_type == "markdown")
    answers = len(_DETAILS.findall(after))
    if answers < SELF_CHECK_QUESTIONS:
        what = f"{answers} collapsed answers after the summary, expected {SELF_CHECK_QUESTIONS} self-check questions"
        yield document.problem("file", "self-check", what)


RULES = (exercises, collapsed, self_check)
