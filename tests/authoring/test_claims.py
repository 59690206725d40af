"""Every claim that a list in data/lessons/*/claims.md names stands in its lesson, and so does what carries it."""

import re
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


def claims_of(text):
    """Pairs of a claim and what carries it, the rows of the table."""
    rows = re.findall(r"^\| (.+) \| (.+) \|$", text, re.MULTILINE)
    return [
        (claim, re.findall(r"`([^`]+)`", carriers)) for claim, carriers in rows[1:] if set(claim) != {"-"}
    ]


def missing(claims, said, shown, root=ROOT):
    """What of the claims isn't in the lesson's words, and what of their carriers neither shown, a file nor a paper."""
    found = []
    for claim, carriers in claims:
        found += [] if as_one_line(claim) in said else [f"not said: {claim}"]
        found += [] if carriers else [f"carried by nothing: {claim}"]
        for carrier in carriers:
            is_file = bool(carrier.strip()) and (root / carrier.split(" ")[0]).exists()
            if not (is_file or re.match(r"arXiv:\d{4}\.\d{4,5}", carrier) or as_one_line(carrier) in shown):
                found.append(f"not shown: {carrier}")
    return found


def test_every_lesson_has_its_list():
    lessons = {path.name[:2] for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    assert {path.parent.name for path in LISTS} == lessons


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.parent.name)
def test_each_claim_stands_in_its_lesson_and_has_a_carrier(path):
    (notebook,) = (ROOT / "notebooks").glob(f"{path.parent.name}_*.ipynb")
    claims = claims_of(path.read_text(encoding="utf-8"))
    said = as_one_line("\n".join(cell.source for cell in Document(notebook).markdown))
    assert len(claims) >= 5
    assert missing(claims, said, shown_in(notebook)) == []


def test_what_is_not_there_is_named():
    text = "| claim | carried by |\n|---|---|\n| It reaches 97 %. | `97.0%` |\n| It is fast. | nothing |\n"
    assert claims_of(text) == [("It reaches 97 %.", ["97.0%"]), ("It is fast.", [])]
    assert missing(claims_of(text), "It reaches 97 %.", "full: 97.0%") == [
        "not said: It is fast.",
        "carried by nothing: It is fast.",
    ]
    assert missing([("a", ["no/such.file"])], "a", "b") == ["not shown: no/such.file"]
    assert missing([("a", ["README.md the series", "arXiv:2104.08691 table 3"])], "a", "b") == []
