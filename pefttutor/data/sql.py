"""Run two SQL queries and compare what they return: execution accuracy."""

import re
import sqlite3
from collections import Counter
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any

# Limits for a query that a model has written; counted, not timed, so that the verdict is the same on any machine.
MAX_INSTRUCTIONS = 5_000_000  # of SQLite's virtual machine, about a second
MAX_ROWS = 10_000
MAX_BYTES = 1_000_000  # of one text or blob
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}


def same_result(predicted: str, expected: str, database: Path) -> bool:
    """Whether both queries return the same rows from `database`, a .sql script or an SQLite file.

    Rows count as a multiset; their order counts when the expected query asks for one. Numbers are compared to six
    decimals. A predicted query that fails, writes, or goes over the limits is wrong.

    >>> from pefttutor.data import info
    >>> database = info("bank_sql").folder / "bank.sql"
    >>> same_result("VALUES (2), (1)", "VALUES (1), (2)", database)
    True
    >>> same_result("VALUES (2), (1)", "SELECT * FROM (VALUES (1), (2)) ORDER BY 1", database)
    False

    Raises: ValueError when the expected query itself fails: then the data is at fault.
    """
    try:
        right = rows(expected, database)
    except sqlite3.Error as error:
        raise ValueError(f"the expected query fails on {database.name} ({error}): {expected}") from None
    try:
        given = rows(predicted, database)
    except sqlite3.Error:
        return False
    return given == right if _ordered(expected) else Counter(given) == Counter(right)


def rows(query: str, database: Path) -> list[tuple[Any, ...]]:
    """What one reading query returns, within the limits; runs in memory, so the file is never changed.

    >>> from pefttutor.data import info
    >>> database = info("bank_sql").folder / "bank.sql"
    >>> rows("SELECT 1 + 2, 'three'", database)
    [(3, 'three')]
    >>> rows("DROP TABLE accounts", database)
    Traceback (most recent call last):
    sqlite3.DatabaseError: not authorized

    Raises: sqlite3.Error for a query that fails, writes, or goes over a limit.
    """
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.deserialize(_image(database, database.stat().st_mtime_ns))
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_BYTES)
        connection.set_authorizer(
            lambda action, *_: sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY
        )
        connection.set_progress_handler(lambda: 1, MAX_INSTRUCTIONS)  # 1 stops the query
        try:
            cursor = connection.execute(query)
        except UnicodeEncodeError as error:  # half a surrogate pair: no text, and no error of SQLite's
            raise sqlite3.ProgrammingError(str(error)) from None
        found = cursor.fetchmany(MAX_ROWS + 1)
    if cursor.description is None:
        raise sqlite3.ProgrammingError("there is no query")  # SQLite takes an empty text for one without rows
    if len(found) > MAX_ROWS:
        raise sqlite3.DataError(f"more than {MAX_ROWS} rows")
    return [tuple(round(v, 6) if isinstance(v, float) else v for v in row) for row in found]


@lru_cache(maxsize=8)
def _image(database: Path, mtime_ns: int) -> bytes:
    """The database as the bytes of an SQLite file; a script is run once, not for each query."""
    if database.suffix != ".sql":
        return database.read_bytes()
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(database.read_text(encoding="utf-8"))
        return connection.serialize()


def _ordered(query: str) -> bool:
    """Whether the outermost SELECT has an ORDER BY: what stands in parentheses or quotes doesn't count."""
    plain = re.sub(r"'(?:[^']|'')*'|\"[^\"]*\"", "", query)
    while plain != (plain := re.sub(r"\([^()]*\)", "", plain)):
        pass
    return re.search(r"\border\s+by\b", plain, re.IGNORECASE) is not None
