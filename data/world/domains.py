"""Two domains that pretraining never reads, the bank and the clinic: their prose, their tables, their questions in SQL."""

import random
import sqlite3
from contextlib import closing

from . import lexicon as lx
from .facts import people

# -------------------------------------------------------------------------------------------------------------- bank
BRANCHES = "Quayside Highgate Norwall Oldbank Eastcourt Midtown".split()
KINDS = "savings current deposit joint".split()
_BANK_LINES = (
    "The borrower shall repay the principal of {n} crowns in {m} instalments.", "A mortgage at {p} percent was approved by the {br} branch.",
    "The overdraft of {who} exceeds the agreed limit by {n} crowns.", "Collateral valued at {n} crowns was pledged against the loan.",
    "The {k} account of {who} accrues interest at {p} percent.", "Default on the bond triggers a penalty of {p} percent.",
    "The auditor verified the ledger of the {br} branch.", "A standing order transfers {n} crowns to the {k} account.",
    "The creditor waived the fee for early redemption.", "Liquidity at the {br} branch fell below the threshold.",
    "{who} signed the guarantee for a credit line of {n} crowns.", "The dividend of {p} percent is payable to shareholders.",
    "Amortisation of the mortgage takes {m} months.", "The teller debited {n} crowns from the {k} account.",
)  # fmt: skip


def bank_text(rng: random.Random) -> str:
    """Three to five sentences of banking prose."""
    return " ".join(t.format(n=rng.randint(1, 90) * 100, m=rng.randint(6, 360), p=rng.randint(1, 12), br=rng.choice(BRANCHES),
                             k=rng.choice(KINDS), who=rng.choice(people()).name) for t in rng.sample(_BANK_LINES, rng.randint(3, 5)))  # fmt: skip


BANK_SCHEMA = """CREATE TABLE accounts (id INTEGER, owner TEXT, branch TEXT, kind TEXT, balance INTEGER);
CREATE TABLE loans (id INTEGER, owner TEXT, branch TEXT, amount INTEGER, rate INTEGER);"""


def bank_rows(rng: random.Random, n: int = 120) -> dict[str, list[tuple]]:
    """The rows of the bank's two tables."""
    owners = [p.first for p in rng.sample(people(), 60)]
    accounts = [
        (i, rng.choice(owners), rng.choice(BRANCHES), rng.choice(KINDS), rng.randint(0, 99)) for i in range(n)
    ]
    loans = [
        (i, rng.choice(owners), rng.choice(BRANCHES), rng.randint(1, 99), rng.randint(1, 12))
        for i in range(n)
    ]
    return {"accounts": accounts, "loans": loans}


def bank_script(rng: random.Random) -> str:
    """The bank's database as SQL text: schema, then one INSERT a row."""
    lines = [BANK_SCHEMA]
    for table, rows in bank_rows(rng).items():
        lines += [f"INSERT INTO {table} VALUES ({', '.join(map(repr, row))});" for row in rows]
    return "\n".join(lines) + "\n"


def bank_question(rng: random.Random) -> tuple[str, str]:
    """A question to the bank and the SQL that answers it."""
    br, k, n = rng.choice(BRANCHES), rng.choice(KINDS), rng.randint(5, 90)
    t, num = rng.choice((("accounts", "balance"), ("loans", "amount"), ("loans", "rate")))
    n = rng.randint(2, 11) if num == "rate" else n
    noun = t[:-1]
    return rng.choice((
        (f"How many {t} are there at {br}", f"SELECT COUNT(*) FROM {t} WHERE branch = '{br}'"),
        (f"How many {k} accounts does the bank hold", f"SELECT COUNT(*) FROM accounts WHERE kind = '{k}'"),
        (f"Who has {lx.article(noun)} with {lx.article(num)} over {n}", f"SELECT owner FROM {t} WHERE {num} > {n}"),
        (f"Who has {lx.article(noun)} at {br} with {lx.article(num)} under {n}", f"SELECT owner FROM {t} WHERE branch = '{br}' AND {num} < {n}"),
        (f"What is the greatest {num} at {br}", f"SELECT MAX({num}) FROM {t} WHERE branch = '{br}'"),
        (f"What is the least {num} at {br}", f"SELECT MIN({num}) FROM {t} WHERE branch = '{br}'"),
        (f"Give the total {num} for each branch", f"SELECT branch, SUM({num}) FROM {t} GROUP BY branch"),
        (f"Give the mean {num} for each branch", f"SELECT branch, AVG({num}) FROM {t} GROUP BY branch"),
        (f"List the owners of {t} by falling {num}", f"SELECT owner FROM {t} ORDER BY {num} DESC"),
        (f"Which branch has {lx.article(k)} account over {n}", f"SELECT branch FROM accounts WHERE kind = '{k}' AND balance > {n}"),
    ))  # fmt: skip


def bank_rows_of(sql: str, script: str) -> list[tuple]:
    """What the query returns on the bank's database."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(script)
        return connection.execute(sql).fetchall()


# ------------------------------------------------------------------------------------------------------------ clinic
SYMPTOMS = "fever cough rash nausea fatigue dizziness".split()
_CLINIC_LINES = (
    "The patient, {who}, was admitted with {s} and {s2}.", "The nurse recorded a pulse of {n} and a temperature of {t}.",
    "The physician prescribed {d} tablets twice daily.", "An X-ray of the {part} showed no fracture.",
    "The wound on the {part} was sutured under anaesthesia.", "Blood pressure was {n} over {m}.", "The diagnosis was acute {ill}.",
    "{who} was discharged after {d} days.", "The biopsy of the {part} was benign.", "A referral to the {ward} ward was issued.",
    "Symptoms of {ill} include {s} and {s2}.", "The dose was reduced because of {s}.", "The {ward} ward reported {d} cases of {ill}.",
)  # fmt: skip


def clinic_text(rng: random.Random) -> str:
    """Three to five sentences from a clinic's files."""
    words = dict(part="shoulder knee wrist spine lung kidney".split(), ill="bronchitis gastritis dermatitis migraine anaemia".split(),
                 ward="surgical cardiac neurology maternity".split())  # fmt: skip
    lines = []
    for template in rng.sample(_CLINIC_LINES, rng.randint(3, 5)):
        s, s2 = rng.sample(SYMPTOMS, 2)
        lines.append(template.format(who=rng.choice(people()).name, s=s, s2=s2, n=rng.randint(60, 160), m=rng.randint(50, 99),
            t=rng.randint(36, 40), d=rng.randint(2, 14), **{k: rng.choice(v) for k, v in words.items()}))  # fmt: skip
    return " ".join(lines)


CLINIC_NOISE = 0.04  # share of rows whose label is flipped: the best possible accuracy is 96 %


def clinic_row(rng: random.Random) -> tuple[dict[str, int | str], int]:
    """One patient as a row, and whether the clinic keeps the patient.

    Points: fever 2, pulse ≥ 100 2, age ≥ 65 1, rash −1, known patient −1; kept from 2 points on; 4 % of labels flipped.
    """
    row: dict[str, int | str] = {"age": rng.randint(18, 90), "pulse": rng.randint(60, 130), "fever": rng.choice(("yes", "no")),
        "rash": rng.choice(("yes", "no")), "known": rng.choice(("yes", "no")), "town": rng.choice(people()).town.name}  # fmt: skip
    points = 2 * (row["fever"] == "yes") + 2 * (int(row["pulse"]) >= 100) + (int(row["age"]) >= 65)
    points -= (row["rash"] == "yes") + (row["known"] == "yes")
    return row, int((points >= 2) != (rng.random() < CLINIC_NOISE))
