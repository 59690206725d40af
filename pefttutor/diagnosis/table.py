"""The table of `diagnose`: a row says what was checked, what was found, the verdict, and what to do."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = ["LOOK", "NOT_CHECKED", "OK", "WRONG", "Diagnosis", "Row", "listed"]

OK, LOOK, WRONG, NOT_CHECKED = "ok", "look", "wrong", "not checked"
WIDTH = 112  # of the table, in characters


@dataclass(frozen=True, repr=False)
class Row:
    """What was checked, what was found, the verdict, and what to do."""

    checked: str
    found: str
    verdict: str
    advice: str = ""

    def of(self, name: str) -> Row:
        """The row of one attachment among several."""
        return replace(self, checked=f"{name}: {self.checked}")

    def __repr__(self) -> str:
        return repr(Diagnosis((self,)))


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many more there are.

    >>> listed(["a", "b", "c"], most=2)
    "'a', 'b' and 1 more"
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What `diagnose` found, a row for each thing that was checked.

    >>> Diagnosis((Row("frozen", "nothing to compare with", "not checked", "give base="),))
    frozen      not checked  nothing to compare with
                             → give base=
    """

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether no row says "look" or "wrong"."""
        return all(row.verdict in (OK, NOT_CHECKED) for row in self.rows)

    def __getitem__(self, checked: str) -> Row:
        """The row of that name, such as "moved", or "german: moved" where there are several attachments."""
        return {row.checked: row for row in self.rows}[checked]

    def __repr__(self) -> str:
        first = max([10, *(len(row.checked) for row in self.rows)]) + 2
        lines = []
        for row in self.rows:
            indent = " " * (first + 13)
            head = f"{row.checked:{first}}{row.verdict:13}"
            lines += textwrap.wrap(row.found, WIDTH, initial_indent=head, subsequent_indent=indent)
            if row.advice:
                text = f"→ {row.advice}"
                lines += textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        cells = [[row.checked, row.verdict, row.found, row.advice] for row in self.rows]
        head = "".join(f"<th>{name}</th>" for name in ("checked", "verdict", "found", "what to do"))
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells
        )
        return f"<table><tr>{head}</tr>{body}</table>"
