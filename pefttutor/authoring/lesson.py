"""Lint, second part: is it a lesson? Its parts in order, its links and pictures, its length."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import unquote

from pefttutor.authoring.document import Document, Problem, without_fences

# Lessons that teach no method of their own, so that there is nothing to compare with a library.
WITHOUT_METHOD = {0, 1, 2, 17, 20}
CELLS = range(35, 61)
WORDS = range(1_000, 2_501)
CODE_LINES = 24  # "about 15"; a cell of plotting or printing may be hidden by jupyter.source_hidden

# (rule, pattern in a heading, what it is, needed in lessons without a method)
PARTS = (
    ("notation", r"\bnotation\b", "a notation table (symbol, name in the code, shape)", True),
    ("prediction", r"\bpredict", "a prediction that the learner makes before running", True),
    (
        "real-thing",
        r"\breal thing\b",
        "'Is it the real thing?': the learner's own against the library's",
        False,
    ),
    ("paper-library", r"\blibrary\b|\bofficial\b", "'Paper, official code, library'", False),
    ("look-inside", r"\blook inside\b", "'Look inside', with the widget", True),
    ("cost", r"\bcosts?\b", "what it costs: parameters and bytes", True),
    ("exercises", r"\bexercise", "the exercises", True),
    ("summary", r"\bsummary\b", "the summary", True),
)
BOX = {
    "what you will be able to do": r"able to",
    "which notebooks come first": r"\bfirst\b|\bbefore\b|\bprerequisite",
    "minutes to read": r"\bminutes?\b|\bmin\b",
    "seconds to run": r"\bseconds?\b|\bs\b",
    "bytes downloaded": r"\bdownload",
    "the papers or the chapter's sections": r"§|\bsection\b|\bchapter\b|\bpapers?\b|\b(eq|equation)s?\b",
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(\s*<?([^)\s>]+)>?[^)]*\)")
_IMG = re.compile(r"<img\b[^>]*>", re.IGNORECASE)


def title(document: Document) -> Iterator[Problem]:
    """`NN_short_name.ipynb`, or `NNb_short_name.ipynb`, and one H1 at the top that begins with the same number."""
    name = re.fullmatch(r"(\d\d[b-z]?)_[a-z0-9_]+\.ipynb", document.path.name)
    if not name:
        what = "the file must be named NN_short_name.ipynb, or NNb_short_name.ipynb (NNc …) for an appendix"
        yield document.problem("file", "name", what)
    tops = [(cell, text) for cell, level, text in document.headings if level == 1]
    if len(tops) != 1:
        yield document.problem("file", "title", f"{len(tops)} first-level headings; a lesson has exactly one")
        return
    cell, text = tops[0]
    if cell is not document.cells[0]:
        yield document.problem(cell, "title", "the title belongs into the first cell")
    if name and not re.match(rf"{name[1]}\b", text):
        yield document.problem(cell, "title", f"the title must begin with {name[1]}, as the file does")


def box(document: Document) -> Iterator[Problem]:
    """The alert box under the title says who should read this, and what it takes."""
    text = next((cell.source for cell in document.markdown[:3] if "alert" in cell.source), None)
    if text is None:
        yield document.problem(
            "file", "box", 'no <div class="alert alert-info"> in the first three text cells'
        )
        return
    for what, pattern in BOX.items():
        if not re.search(pattern, text, re.IGNORECASE):
            yield document.problem("file", "box", f"the box doesn't say {what}")


def setup(document: Document) -> Iterator[Problem]:
    """The first code cell installs on Colab what Colab lacks, never torch, and does nothing at home."""
    first = document.code[0] if document.code else None
    if first is None or '"google.colab" in sys.modules' not in first.source:
        what = 'the first code cell must be the setup: if "google.colab" in sys.modules: %pip install …'
        yield document.problem(first if first else "file", "setup", what)
    elif re.search(r"pip install.*\btorch\b", first.source):
        yield document.problem(first, "setup", "the setup must not replace Colab's torch")


def parts(document: Document) -> Iterator[Problem]:
    """Every part of the anatomy has its heading; an appendix has the parts that it needs."""
    if document.appendix:
        return
    headings = [text for _, level, text in document.headings if level > 1]
    for rule, pattern, what, always in PARTS:
        needed = always or document.number not in WITHOUT_METHOD
        if needed and not any(re.search(pattern, text, re.IGNORECASE) for text in headings):
            yield document.problem(
                "file", rule, f"no heading with {pattern.replace(chr(92) + 'b', '')!r}: {what}"
            )
    notation = [
        cell for cell, _, text in document.headings if re.search(r"\bnotation\b", text, re.IGNORECASE)
    ]
    if notation and not any(re.search(r"^\s*\|?[ :|-]*---", cell.source, re.MULTILINE) for cell in notation):
        yield document.problem(notation[0], "notation", "the cell under this heading holds no table")


def links(document: Document) -> Iterator[Problem]:
    """Links lead somewhere, pictures have words, and nothing is fetched from afar."""
    for cell in document.markdown:
        source = without_fences(cell.source)
        for is_picture, words, target in _LINK.findall(source):
            if is_picture and len(words.split()) < 4:
                yield document.problem(cell, "alt", f"the picture {target} has no alt text worth the name")
            if is_picture and re.match(r"https?:|//", target):
                yield document.problem(
                    cell, "remote", f"the picture {target} is fetched; draw it, or commit it"
                )
            if not re.match(r"[a-z]+:|#|//", target):
                yield from _leads_somewhere(document, cell, target)
        for tag in _IMG.findall(source):
            if not re.search(r"""alt=["'][^"']{10,}["']""", tag):
                yield document.problem(cell, "alt", f"no alt text in {tag[:60]}")


def _leads_somewhere(document: Document, cell: object, target: str) -> Iterator[Problem]:
    file = document.path.parent / unquote(target.split("#")[0])
    if not file.exists():
        yield document.problem(cell, "link", f"{target} does not exist")


def next_lesson(document: Document) -> Iterator[Problem]:
    """The last text cell names the next lesson, and links it when it exists."""
    if document.number is None or not document.markdown:
        return
    later = sorted(document.path.parent.glob("[0-9][0-9]_*.ipynb"))
    after = [path.name for path in later if path.name > document.path.name]
    last = document.markdown[-1].source
    if after and not any(name in last for name in after):
        yield document.problem(document.markdown[-1], "next", f"the last text cell must link {after[0]}")


def budget(document: Document) -> Iterator[Problem]:
    """A lesson that can be read in one sitting, in cells that can be seen whole; an appendix may be shorter."""
    cells, words = len(document.cells), sum(len(without_fences(c.source).split()) for c in document.markdown)
    if cells not in (range(1, CELLS.stop) if document.appendix else CELLS):
        yield document.problem("file", "budget", f"{cells} cells, expected {CELLS.start} to {CELLS.stop - 1}")
    if words not in (range(1, WORDS.stop) if document.appendix else WORDS):
        yield document.problem(
            "file", "budget", f"{words} words of text, expected {WORDS.start} to {WORDS.stop - 1}"
        )
    for cell in document.code:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        hidden = cell.metadata.get("jupyter", {}).get("source_hidden", False)
        if len(lines) > CODE_LINES and not hidden:
            what = f"{len(lines)} lines, at most {CODE_LINES}: split it, or hide it (jupyter.source_hidden)"
            yield document.problem(cell, "budget", what)


RULES = (title, box, setup, parts, links, next_lesson, budget)
