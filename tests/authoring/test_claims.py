"""Every claim that a list in data/lessons/*/claims.md names stands in its lesson, and so does what carries it."""

import re
from functools import cache
from pathlib import Path

import pytest

from pefttutor.authoring.document import Document, texts

ROOT = Path(__file__).resolve().parents[2]
LISTS = sorted((ROOT / "data" / "lessons").glob("*/claims.md"))


def as_one_line(text):
    return " ".join(text.split())


def shown_in(notebook):
    """Everything that the notebook's cells have printed."""
    cells = Document(notebook).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return as_one_line(" ".join(text for output in outputs for text in texts(output)))


@cache
def contents(path):
    """A file's text; a notebook's cells and what they have printed."""
    if path.suffix != ".ipynb":
        return as_one_line(path.read_text(encoding="utf-8"))
    return as_one_line(" ".join(cell.source for cell in Document(path).cells)) + " " + shown_in(path)


def claims_of(text):
    """Pairs of a claim and what carries it, the rows of the table."""
    rows = re.findall(r"^\| (.+) \| (.+) \|$", text, re.MULTILINE)
    return [
        (claim, re.findall(r"`([^`]+)`", carriers)) for claim, carriers in rows[1:] if set(claim) != {"-"}
    ]


def parts_of(text):
    """Pairs of a notebook's number and what follows its title."""
    return re.findall(r"^# (\d\d[b-z]?) (.+?)(?=^# \d|\Z)", text, re.MULTILINE | re.DOTALL)


def stands_in(said, text):
    """Whether it stands there as a whole, not as the end or the beginning of another word or number."""
    words = re.escape(as_one_line(said))
    return bool(words) and re.search(rf"(?<![\w.]){words}(?!\w|\.\d)", text) is not None


def carries(carrier, shown, root):
    """Whether that is a paper, a file and what stands in it, or was printed."""
    first, _, rest = carrier.partition(" ")
    if (root / first).is_file():
        return all(as_one_line(words) in contents(root / first) for words in rest.split(", "))
    return bool(re.match(r"arXiv:\d{4}\.\d{4,5}", carrier)) or stands_in(carrier, shown)


def missing(claims, said, shown, root=ROOT):
    """What of the claims isn't in the lesson's words, and what of their carriers carries nothing."""
    found = []
    for claim, carriers in claims:
        found += [] if as_one_line(claim) in said else [f"not said: {claim}"]
        found += [] if carriers else [f"carried by nothing: {claim}"]
        found += [f"not shown: {carrier}" for carrier in carriers if not carries(carrier, shown, root)]
    return found


def test_every_lesson_has_its_list():
    lessons = {path.name[:2] for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    assert {path.parent.name for path in LISTS} == lessons


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.parent.name)
def test_each_claim_stands_in_its_notebook_and_has_a_carrier(path):
    """A list begins with the lesson's claims; those of its appendices, if any, follow under titles of their own."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# {path.parent.name} ")
    lesson, *appendices = parts_of(text)
    letters = [number.removeprefix(path.parent.name) for number, _ in appendices]
    assert letters == sorted({*letters} & {*"bcde"})
    assert len(claims_of(lesson[1])) >= 5
    for number, part in (lesson, *appendices):
        (notebook,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
        claims = claims_of(part)
        assert len(claims) == len(re.findall(r"^\s*\|", part, re.MULTILINE)) - 2  # no row is passed over
        said = as_one_line("\n".join(cell.source for cell in Document(notebook).markdown))
        assert missing(claims, said, shown_in(notebook)) == []


def test_what_is_not_there_is_named():
    text = "| claim | carried by |\n|---|---|\n| It reaches 97 %. | `97.0%` |\n| It is fast. | nothing |\n"
    assert parts_of(f"# 12 A\n{text}# 12b B\nB") == [("12", f"A\n{text}"), ("12b", "B\nB")]
    assert claims_of(text) == [("It reaches 97 %.", ["97.0%"]), ("It is fast.", [])]
    assert missing(claims_of(text), "It reaches 97 %.", "full: 97.0%") == [
        "not said: It is fast.",
        "carried by nothing: It is fast.",
    ]
    assert missing([("a", ["README.md The series", "arXiv:2104.08691 table 3"])], "a", "b") == []
    shown = "pefttutor equals 67 of 67, full: 97.05 %"
    assert missing([("a", ["67 of 67", "full: 97.05 %"])], "a", shown) == []
    for wrong in (
        "no/such.file",
        "README.md The sequel",
        "README.md The series, and the sequel",
        "pefttutor equals all",  # a folder's name carries nothing
        "data and more",
        ". and more",
        "7 of 67",
        "full: 97",
        " ",
    ):
        assert missing([("a", [wrong])], "a", shown) == [f"not shown: {wrong}"]
