"""Queries that models write: compared by what they return, and kept from doing harm."""

import sqlite3
from pathlib import Path

import pytest

from pefttutor.data import sql

SCRIPT = """
CREATE TABLE accounts (id INTEGER, owner TEXT, balance INTEGER);
INSERT INTO accounts VALUES (1, 'Ann', 5), (2, 'Bo', 7), (3, 'Ann', 7);
"""
FOREVER = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n"


@pytest.fixture(params=["bank.sql", "bank.db"])
def bank(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    if path.suffix == ".sql":
        path.write_text(SCRIPT)
    else:
        connection = sqlite3.connect(path)
        connection.executescript(SCRIPT)
        connection.close()
    path.chmod(0o444)
    return path


@pytest.mark.parametrize(
    ("predicted", "expected", "same"),
    [
        (
            "SELECT owner FROM accounts WHERE balance > 6",
            "SELECT owner FROM accounts WHERE balance >= 7",
            True,
        ),
        ("SELECT owner FROM accounts ORDER BY id DESC", "SELECT owner FROM accounts", True),
        ("SELECT owner FROM accounts", "SELECT owner FROM accounts ORDER BY balance DESC, id", False),
        ("SELECT id FROM accounts", "SELECT id FROM accounts ORDER BY id", True),
        ("SELECT DISTINCT owner FROM accounts", "SELECT owner FROM accounts", False),  # a multiset, no set
        ("SELECT 0.1 + 0.2", "SELECT 0.3", True),
        ("SELECT AVG(balance) FROM accounts", "SELECT 19 / 3.0", True),
        ("SELECT owner, id FROM accounts", "SELECT id, owner FROM accounts", False),
        ("SELECT nonsense FROM accounts", "SELECT owner FROM accounts", False),
        ("SELEC", "SELECT owner FROM accounts WHERE 0", False),
        ("", "SELECT owner FROM accounts WHERE 0", False),
        ("-- nothing", "SELECT owner FROM accounts WHERE 0", False),
        ("SELECT 1; SELECT 2", "SELECT 1", False),
        ("SELECT 1\0", "SELECT 1", False),
        ("SELECT '\ud800'", "SELECT 1", False),
        ("SELECT 1.0000004", "SELECT 1", True),  # to six decimals, however large the number
        ("SELECT 1234567.8", "SELECT 1234567.9", False),
        ("SELECT 0.0000004", "SELECT 0", True),
    ],
)
def test_same_result(bank: Path, predicted: str, expected: str, same: bool) -> None:
    assert sql.same_result(predicted, expected, bank) is same


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM accounts",
        "UPDATE accounts SET balance = 0",
        "DROP TABLE accounts",
        "INSERT INTO accounts VALUES (4, 'Cy', 1)",
        "ATTACH DATABASE 'other.db' AS other",
        "PRAGMA writable_schema = 1",
        "SELECT load_extension('evil')",
        "SELECT zeroblob(100000000)",
        FOREVER,
        "SELECT a.id FROM accounts a, accounts b, accounts c, accounts d, accounts e, accounts f, accounts g, "
        "accounts h, accounts i",
    ],
)
def test_harmful_and_endless_queries_are_wrong(bank: Path, query: str) -> None:
    before = bank.read_bytes()
    with pytest.raises(sqlite3.Error):
        sql.rows(query, bank)
    assert not sql.same_result(query, "SELECT COUNT(*) FROM accounts", bank)
    assert bank.read_bytes() == before
    assert [path.name for path in bank.parent.iterdir()] == [bank.name]


def test_an_expected_query_that_fails_is_an_error_of_the_data(bank: Path) -> None:
    with pytest.raises(
        ValueError, match=r"the expected query fails on bank\.\w+ .*no such table: loans.*FROM loans"
    ):
        sql.same_result("SELECT 1", "SELECT * FROM loans", bank)


@pytest.mark.parametrize("query", ["SELECT 1; SELECT 2", "SELECT 1\0", "SELECT '\ud800'", ""])
def test_an_expected_text_that_is_no_query_is_an_error_of_the_data_too(bank: Path, query: str) -> None:
    with pytest.raises(sqlite3.Error):
        sql.rows(query, bank)
    with pytest.raises(ValueError, match=r"the expected query fails on bank\.\w+ "):
        sql.same_result("SELECT 1", query, bank)


@pytest.mark.parametrize(
    ("query", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n by a", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a LIMIT 3)", False),
        ("SELECT a FROM t WHERE b = 'order by x'", False),
        ("SELECT ROW_NUMBER() OVER (PARTITION BY (a) ORDER BY b) FROM t", False),
    ],
)
def test_only_the_outermost_order_counts(query: str, ordered: bool) -> None:
    assert sql._ordered(query) is ordered


def test_a_changed_database_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "bank.sql"
    path.write_text("CREATE TABLE t (a); INSERT INTO t VALUES (1);")
    assert sql.rows("SELECT a FROM t", path) == [(1,)]
    path.write_text("CREATE TABLE t (a); INSERT INTO t VALUES (2);")
    assert sql.rows("SELECT a FROM t", path) == [(2,)]
