"""Lint, first part: is this the form that `store` writes, and is it one that strict nbval can compare?"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pefttutor.authoring.document import (
    ADDRESS,
    MACHINE_PATH,
    PICTURES,
    PROGRESS,
    WIDGET_VIEW,
    Document,
    Problem,
    canonical,
    compared,
    marks,
    may_raise,
    texts,
)

STORE = "run `python -m pefttutor.authoring store` on it"
MAX_FILE_BYTES = 2_000_000
MAX_OUTPUT_BYTES = 400_000
CAPTURING = {"Output", "interact", "interact_manual", "interactive", "interactive_output"}
# More digits than a sum on another processor keeps.
_LONG_NUMBER = re.compile(r"\d\.\d{5,}")
_BARE_VALUE = re.compile(r"\s*(-?\d+\.\d+(e[+-]?\d+)?|tensor\(|array\(|\[?<[\w.]+ (object )?at 0x)")


def stored(document: Document) -> Iterator[Problem]:
    """The file is what `store` wrote: canonical text, our kernel, no widget state, not too large."""
    metadata = document.notebook.get("metadata", {})
    if metadata.get("kernelspec", {}).get("name") != "python3":
        yield document.problem("file", "kernel", f"the kernel must be python3; {STORE}")
    if "widgets" in metadata:
        yield document.problem(
            "file", "widget-state", f"metadata.widgets hides the notebook on GitHub; {STORE}"
        )
    if document.text != canonical(document.notebook):
        yield document.problem("file", "canonical", f"the file's text isn't in its canonical form; {STORE}")
    size = len(document.text.encode())
    if size > MAX_FILE_BYTES:
        yield document.problem(
            "file", "size", f"{size:,} bytes, at most {MAX_FILE_BYTES:,}: fewer or smaller figures"
        )


def counts(document: Document) -> Iterator[Problem]:
    """Code cells are counted 1…N: one without a count is run by nbval, and silently not compared."""
    for expected, cell in enumerate(document.code, start=1):
        if cell.get("execution_count") != expected:
            what = f"execution count {cell.get('execution_count')}, expected {expected}; {STORE}"
            yield document.problem(cell, "execution-counts", what)
        if not cell.source.strip():
            yield document.problem(cell, "empty-cell", "the code cell is empty; remove it")


def ids(document: Document) -> Iterator[Problem]:
    """Every cell has an id of its own: links, checks and reviews name cells by it."""
    seen = Counter(cell.get("id") for cell in document.cells)
    for cell in document.cells:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", cell.get("id") or ""):
            yield document.problem(cell, "cell-ids", f"id {cell.get('id')!r} is not a short word; {STORE}")
        elif seen[cell.id] > 1:
            yield document.problem(
                cell, "cell-ids", f"{seen[cell.id]} cells have this id; rename all but one"
            )


def outputs(document: Document) -> Iterator[Problem]:
    """What is shown is for a reader on another machine: no stderr, path, address or progress; pictures have words."""
    for cell in document.code:
        for output in cell.get("outputs", []):
            for rule, what in _shown_wrong(output, cell):
                yield document.problem(cell, rule, what)
        has_error = any(output.output_type == "error" for output in cell.get("outputs", []))
        if may_raise(cell) and not has_error:
            yield document.problem(cell, "error", f"tagged raises-exception, but no error is stored; {STORE}")
        if has_error and not may_raise(cell):
            yield document.problem(
                cell, "error", "stores an error; mend the cell, or tag it raises-exception"
            )


def _shown_wrong(output: Any, cell: Any) -> Iterator[tuple[str, str]]:
    if output.get("name") == "stderr":
        yield "stderr", "writes to stderr; silence its cause (a warning, a log, a bar)"
    shown = "\n".join(texts(output))
    for pattern, rule, what in (
        (MACHINE_PATH, "path", "shows a path of one machine: {!r}; print the name only"),
        (ADDRESS, "address", "shows an object's address: {!r}; print what the reader needs"),
        (PROGRESS, "progress", "shows progress text: {!r}; turn the bar off"),
    ):
        match = pattern.search(shown)
        if match:
            yield rule, what.format(match[0])
    data = output.get("data", {})
    if WIDGET_VIEW in data:
        yield "widget-state", f"stores a live widget's view; {STORE}"
    if "image/svg+xml" in data:
        yield "picture", "shows SVG, which nbval compares letter by letter; show a PNG"
    if any(kind in data for kind in PICTURES) and not _alt(output, cell):
        yield (
            "alt",
            "the figure has no alt text; show it by pefttutor.widgets.Picture, or set the cell's metadata.alt",
        )
    if sum(len(str(value)) for value in [*data.values(), shown]) > MAX_OUTPUT_BYTES:
        yield "size", f"one output is larger than {MAX_OUTPUT_BYTES:,} bytes; show less"


def _alt(output: Any, cell: Any) -> bool:
    of_output = [output.get("metadata", {}).get(kind, {}).get("alt", "") for kind in PICTURES]
    return any(len(alt.split()) >= 4 for alt in [*of_output, cell.metadata.get("alt", "")])


def comparable(document: Document) -> Iterator[Problem]:
    """Most cells are compared, and what is compared comes out the same on another processor."""
    code = document.code
    left_out = [cell for cell in code if not compared(cell)]
    if len(left_out) > len(code) / 2:
        what = (
            f"only {len(code) - len(left_out)} of {len(code)} code cells are compared; at least half must be"
        )
        yield document.problem("file", "compared", what)
    for cell in code:
        if "nbval-skip" in marks(cell):
            yield document.problem(
                cell, "compared", "nbval-skip: the cell would never run under test; don't skip it"
            )
        elif not compared(cell) and not re.search(r"^\s*assert\b", cell.source, re.MULTILINE):
            yield document.problem(
                cell, "asserts", "the output isn't compared, so the cell must `assert` its claim"
            )
        for output in cell.get("outputs", []) if compared(cell) else []:
            shown = "\n".join(texts(output))
            if output.output_type == "execute_result" and _BARE_VALUE.match(shown):
                yield document.problem(
                    cell, "bare-value", f"ends in a bare value {shown[:40]!r}; print it rounded"
                )
            elif long := _LONG_NUMBER.search(shown):
                yield document.problem(cell, "digits", f"compares {long[0]!r}; round it, or print a verdict")


def code_style(document: Document) -> Iterator[Problem]:
    """Code that strict nbval or a notebook without a kernel can't stand."""
    for cell in document.code:
        if cell.source.rstrip().endswith(";"):
            yield document.problem(cell, "semicolon", "a trailing ';' fails under nbval; write `_ = …`")
        if re.search(r"^\s*!", cell.source, re.MULTILINE):
            yield document.problem(cell, "shell", "a shell command isn't the same everywhere; use Python")
        try:
            tree = ast.parse(re.sub(r"^(\s*)%", r"\1pass  #%", cell.source, flags=re.MULTILINE))
        except SyntaxError as error:
            yield document.problem(cell, "syntax", f"line {error.lineno}: {error.msg}")
            continue
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        if used & CAPTURING:
            names = ", ".join(sorted(used & CAPTURING))
            what = f"uses {names}: its output is lost outside JupyterLab; use pefttutor.widgets.Explorer"
            yield document.problem(cell, "output-widget", what)


RULES = (stored, counts, ids, outputs, comparable, code_style)
