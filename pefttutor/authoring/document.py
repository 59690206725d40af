"""A notebook as the tool reads it: cells, tags, outputs, and the one text form in which it is committed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nbformat

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
PICTURES = ("image/png", "image/jpeg")

# What differs from machine to machine, or from run to run, and therefore has no place in a stored output.
MACHINE_PATH = re.compile(
    r"(?<![\w.:/])/(?:root|home|tmp|Users|work|opt|var|private|usr|mnt|content)/|\b[A-Z]:\\\w"
)
ADDRESS = re.compile(r"\b0x[0-9a-f]{8,}\b")
PROGRESS = re.compile(r"\r(?!\n)|\d%\||\bit/s\b|\bs/it\b")

_COMMENT = re.compile(r"^\s*#+\s*NBVAL_(\w+)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """One thing that a lesson must not have, or lacks: where it is, which rule says so, and what to do.

    >>> print(Problem("12_lora.ipynb", cell="stub", rule="empty-cell", what="the code cell is empty; remove it"))
    12_lora.ipynb [stub] empty-cell: the code cell is empty; remove it
    """

    file: str
    cell: str
    rule: str
    what: str

    def __str__(self) -> str:
        return f"{self.file} [{self.cell}] {self.rule}: {self.what}"


class NotANotebook(ValueError):
    """The file can't be read as a notebook (see `Document`)."""


class Document:
    """A notebook file, with the questions that the rules ask.

    >>> Document("x.ipynb")
    Traceback (most recent call last):
    pefttutor.authoring.document.NotANotebook: x.ipynb can't be read: [Errno 2] No such file or directory: 'x.ipynb'

    Raises: NotANotebook when the file is missing, isn't JSON, or has no cells.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self.text = self.path.read_text(encoding="utf-8")
            raw = json.loads(self.text)
        except (OSError, ValueError) as error:
            raise NotANotebook(f"{self.path.name} can't be read: {error}") from None
        if not isinstance(raw, dict) or not isinstance(raw.get("cells"), list):
            raise NotANotebook(f"{self.path.name} has no list of cells")
        self.notebook = nbformat.from_dict(raw)

    @cached_property
    def cells(self) -> list[Any]:
        return [joined(cell) for cell in self.notebook.cells]

    @cached_property
    def code(self) -> list[Any]:
        return [cell for cell in self.cells if cell.cell_type == "code"]

    @cached_property
    def markdown(self) -> list[Any]:
        return [cell for cell in self.cells if cell.cell_type == "markdown"]

    @cached_property
    def number(self) -> int | None:
        """12 for `12_lora.ipynb`; None when the name does not begin with two digits."""
        match = re.match(r"(\d\d)_", self.path.name)
        return int(match[1]) if match else None

    @cached_property
    def appendix(self) -> bool:
        """Whether it belongs to a lesson, as 11b and a further 11c do; it then has no number of its own."""
        return re.match(r"\d\d[b-z]_", self.path.name) is not None

    @cached_property
    def headings(self) -> list[tuple[Any, int, str]]:
        """(cell, level, text) of every heading in order; lines inside code fences are none."""
        headings = []
        for cell in self.markdown:
            for line in without_fences(cell.source).splitlines():
                match = re.match(r"(#{1,6})\s+(.*)", line)
                if match:
                    headings.append((cell, len(match[1]), match[2].strip()))
        return headings

    def problem(self, cell: Any, rule: str, what: str) -> Problem:
        """A problem in a cell, or in "file" as a whole."""
        place = cell if isinstance(cell, str) else name_of(cell, self.cells)
        return Problem(self.path.name, place, rule, what)


def joined(cell: Any) -> Any:
    """The cell with its source as one string (the file keeps it as a list of lines).

    >>> joined({"source": ["x = 1; ", "y = 2"]})
    {'source': 'x = 1; y = 2'}
    """
    source = cell.get("source", "")
    cell["source"] = source if isinstance(source, str) else "".join(source)
    return cell


def name_of(cell: Any, cells: list[Any]) -> str:
    """What a cell is called in messages: its id, or its place among the cells.

    >>> name_of({"id": "stub"}, []), name_of({}, [{}])
    ('stub', 'cell 0')
    """
    return cell.get("id") or f"cell {cells.index(cell)}"


def without_fences(markdown: str) -> str:
    r"""A text without its fenced blocks of code.

    >>> without_fences("text\n~~~\n# a comment, not a heading\n~~~")
    'text\n'
    """
    return re.sub(r"^(```|~~~).*?^\1", "", markdown, flags=re.DOTALL | re.MULTILINE)


def marks(cell: Any) -> set[str]:
    """nbval's marks on a cell, from tags and comments, as tags: {"nbval-ignore-output", "raises-exception", …}.

    >>> cell = nbformat.v4.new_code_cell("# NBVAL_IGNORE_OUTPUT", metadata={"tags": ["raises-exception"]})
    >>> sorted(marks(cell))
    ['nbval-ignore-output', 'raises-exception']
    """
    comments = {f"nbval-{word.lower().replace('_', '-')}" for word in _COMMENT.findall(cell.source)}
    return set(cell.metadata.get("tags", [])) | comments


def may_raise(cell: Any) -> bool:
    """Whether the cell is meant to raise.

    >>> may_raise(nbformat.v4.new_code_cell("1 / 0", metadata={"tags": ["raises-exception"]}))
    True
    """
    return "raises-exception" in marks(cell)  # the one tag that nbclient, nbconvert and nbval all know


def compared(cell: Any) -> bool:
    """Whether nbval compares what the cell shows.

    >>> compared(nbformat.v4.new_code_cell("f()")), compared(nbformat.v4.new_code_cell("# NBVAL_IGNORE_OUTPUT"))
    (True, False)
    """
    return not marks(cell) & {"nbval-ignore-output", "nbval-skip"}


def texts(output: Any) -> Iterator[str]:
    """Every piece of text that an output shows to a reader.

    >>> list(texts(nbformat.v4.new_output("stream", text="loss 0.3")))
    ['loss 0.3']
    """
    if output.output_type == "stream":
        yield _text(output.get("text", ""))
    elif output.output_type == "error":
        yield f"{output.ename}: {output.evalue}"
        yield from output.get("traceback", [])
    for kind, value in output.get("data", {}).items():
        if kind not in PICTURES and kind != WIDGET_VIEW:
            yield _text(value)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "".join(value)
    return value if isinstance(value, str) else json.dumps(value)


def canonical(notebook: Any) -> str:
    """The one text form of a notebook: keys sorted, one blank of indentation, characters as they are, a newline.

    >>> canonical(nbformat.v4.new_notebook()).splitlines()
    ['{', ' "cells": [],', ' "metadata": {},', ' "nbformat": 4,', ' "nbformat_minor": 5', '}']
    """
    split = nbformat.v4.rwbase.split_lines(nbformat.from_dict(json.loads(json.dumps(notebook))))
    return json.dumps(split, indent=1, sort_keys=True, ensure_ascii=False, separators=(",", ": ")) + "\n"
