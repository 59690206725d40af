"""All the rules on one notebook."""

from __future__ import annotations

from pathlib import Path

from pefttutor.authoring import form, lesson, practice
from pefttutor.authoring.document import Document, NotANotebook, Problem

RULES = (*form.RULES, *lesson.RULES, *practice.RULES)


def lint(path: Path | str) -> list[Problem]:
    """Everything that keeps a notebook from being a lesson of the series; an empty list when nothing does.

    >>> print(*lint("x.ipynb"))
    x.ipynb [file] notebook: x.ipynb can't be read: [Errno 2] No such file or directory: 'x.ipynb'
    """
    try:
        document = Document(path)
    except NotANotebook as error:
        return [Problem(Path(path).name, "file", "notebook", str(error))]
    return [problem for rule in RULES for problem in rule(document)]
