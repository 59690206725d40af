"""Tables of training runs: trained once, resumed, thrown away with their script, searched at the window's edge."""

from __future__ import annotations

import copy
import hashlib
import json
import re

import pytest

import pefttutor
from pefttutor.authoring import tables as runs
from pefttutor.authoring.provenance import digests
from pefttutor.models.carriers import root

HEADER = {"command": "python data/lessons/99/try.py", "seeds": [0, 1], "search_seeds": [7, 8]}


class Trained:
    """Validation is best at the rate `best`; every run is noted."""

    def __init__(self, best):
        self.best, self.calls = best, []

    def __call__(self, way, lr, seed):
        self.calls.append((way, lr, seed))
        return {"validation": 1 - abs(lr - self.best) + 0.001 * seed, "test": lr / 3}


def table(path, train, header=HEADER):
    return runs.Table(path, header, ("way", "lr", "seed"), train)


def test_a_run_is_trained_once_and_stands_in_the_file_at_once(tmp_path):
    train, path = Trained(2), tmp_path / "try.jsonl"
    opened = table(path, train)
    first = opened["a", 1, 0]
    assert (
        opened["a", 1, 0]
        == first
        == {"way": "a", "lr": 1, "seed": 0, "validation": 0.0, "test": 0.333333, "seconds": 0.0}
    )
    assert [json.loads(line) for line in path.read_text().splitlines()] == [HEADER, first]
    again = table(path, train)
    assert again["a", 1, 0] == first
    assert train.calls == [("a", 1, 0)]


def test_a_row_made_under_another_header_is_trained_again(tmp_path):
    train, path = Trained(2), tmp_path / "try.jsonl"
    table(path, train)["a", 1, 0]
    table(path, train, HEADER | {"script_sha256": "other"})["a", 1, 0]
    assert len(train.calls) == 2
    assert len(path.read_text().splitlines()) == 2


def test_another_torch_goes_on_with_a_table_whose_header_then_names_both(tmp_path):
    train, path = Trained(2), tmp_path / "try.jsonl"
    for torch, way in (("2.11.0", "a"), ("2.13.0", "b"), ("2.11.0", "b")):
        table(path, train, HEADER | {"python": "3.11.2", "versions": {"torch": torch}})[way, 1, 0]
    header, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert header == HEADER | {"python": "3.11.2", "versions": {"torch": "2.11.0 and 2.13.0"}}
    assert (len(rows), len(train.calls)) == (2, 2)


@pytest.mark.parametrize("best", [1, 2, 3, 4, 5, 6])
def test_the_search_leaves_the_window_only_where_the_best_lies_at_its_edge(tmp_path, best):
    train = Trained(best)
    rates = [1, 2, 3, 4, 5, 6]
    assert table(tmp_path / "try.jsonl", train).best_rates(("a",), rates, [(3, 4)], seeds=(7, 8)) == (best,)
    tried = {lr for _, lr, _ in train.calls}
    assert tried == set(range(min(3, best - 1) or 1, max(4, min(best + 1, 6)) + 1)) & set(rates)


def test_of_equal_rates_the_smaller_one_is_taken(tmp_path):
    level = table(tmp_path / "try.jsonl", lambda way, lr, seed: {"validation": 0.5})
    assert level.best_rates(("a",), [1, 2, 3], [(1, 3)], seeds=(7,)) == (1,)


class Phases:
    """The best rate of the second phase depends on the first one's; both lie outside of the windows."""

    columns = ("way", "first_lr", "lr", "seed")

    def __init__(self):
        self.calls = []

    def __call__(self, way, first_lr, lr, seed):
        self.calls.append((way, first_lr, lr, seed))
        first = 3 if first_lr is None else first_lr
        return {"validation": -((lr - 6) ** 2) - (first - 3) ** 2 - (lr - 2 * first) ** 2, "test": 0.0}


def test_rates_of_two_phases_are_searched_together(tmp_path):
    train = Phases()
    found = runs.Table(tmp_path / "try.jsonl", HEADER, train.columns, train)
    rates = list(range(1, 9))
    assert found.best_rates(("a",), rates, [(1, 2), (1, 3)], seeds=(7, 8)) == (3, 6)
    assert found.best_rates(("b",), rates, [None, (1, 3)], seeds=(7, 8)) == (None, 6)
    assert len(train.calls) == len(set(train.calls)) < 2 * 8 * 8
    assert {first for way, first, *_ in train.calls if way == "b"} == {None}


def test_the_lesson_reads_a_table_of_two_phases(data_folder):
    script = data_folder / "lessons/99/try.py"
    script.write_text("pass")
    windows = {("a",): [(1, 2), (1, 3)], ("b",): [None, (1, 3)], ("fitted",): None}
    either = Phases()

    def train(way, first_lr, lr, seed):
        return either(way, first_lr, lr or 0, seed)

    runs.compare(
        script, train, windows, columns=["way"], rates=list(range(1, 9)), seeds=range(2), search_seeds=[7, 8],
        model="m", tasks=["t"], phases=["first_lr", "lr"],
    )  # fmt: skip
    header, rows = runs.read("99/try.jsonl")
    chosen = {
        case: {(r["first_lr"], r["lr"]) for r in found} for case, found in runs.best(header, rows).items()
    }
    assert chosen == {("a",): {(3, 6)}, ("b",): {(None, 6)}, ("fitted",): {(None, None)}}
    assert max(runs.searched(header, rows)["a",].items(), key=lambda item: item[1]) == ((3, 6), 0.0)
    del rows[-1]
    with pytest.raises(ValueError, match=r"\('fitted',\) at lr=\(None, None\) lacks the seeds \[1\]"):
        runs.best(header, rows)


@pytest.mark.parametrize("search_seeds", [[7, 8], [0]])
def test_what_has_no_rate_is_run_by_every_seed_and_searched_by_none(data_folder, search_seeds):
    script, train = data_folder / "lessons/99/try.py", Trained(2)
    script.write_text("pass")
    where = {"columns": ["way"], "rates": [1, 2, 3], "model": "m", "tasks": ["t"]}

    def either(way, lr, seed):
        return train(way, 2 if lr is None else lr, seed)

    runs.compare(
        script,
        either,
        {("fitted",): None, ("a",): (1, 2)},
        seeds=range(2),
        search_seeds=search_seeds,
        **where,
    )
    header, rows = runs.read("99/try.jsonl")
    assert [(row["lr"], row["seed"]) for row in rows if row["way"] == "fitted"] == [(None, 0), (None, 1)]
    assert [row["seed"] for row in runs.best(header, rows)["fitted",]] == [0, 1]
    assert runs.searched(header, rows)["fitted",] == {}
    assert {row["lr"] for row in runs.best(header, rows)["a",]} == {2}


@pytest.fixture
def lesson(data_folder):
    """The data folder with a lesson whose script has run."""
    script = data_folder / "lessons/99/try.py"
    script.write_text("pass")
    where = {"columns": ["way"], "rates": [1, 2, 3], "model": "m", "tasks": ["t"], "steps": 60}
    runs.compare(
        script, Trained(2), {("a",): (1, 3), ("b",): (1, 2)}, seeds=range(2), search_seeds=[7, 8], **where
    )
    return data_folder


def test_the_lesson_reads_what_the_script_compared(lesson):
    header, rows = runs.read("99/try.jsonl")
    assert header["command"] == "python data/lessons/99/try.py"
    assert (header["tasks"], header["steps"], header["seeds"]) == ({"t": "f"}, 60, [0, 1])
    assert len(rows) == 2 * (
        3 * 2 + 2
    )  # two ways: three rates by the seeds of the search, then the best by all
    found = runs.best(header, rows)
    assert {case: [(row["lr"], row["seed"]) for row in by_seed] for case, by_seed in found.items()} == {
        ("a",): [(2, 0), (2, 1)],
        ("b",): [(2, 0), (2, 1)],
    }


def test_of_equal_rates_the_lesson_takes_the_one_that_the_script_took():
    header = {"search_seeds": [7], "seeds": [0]}
    rows = [{"way": "a", "lr": lr, "seed": 7, "validation": 0.5} for lr in (3, 1, 2)]
    rows.append({"way": "a", "lr": 1, "seed": 0, "validation": 0.4})
    assert runs.best(header, rows) == {("a",): [rows[-1]]}


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("lessons/99/try.py", "script"),
        ("models/m/model.safetensors", "model"),
        ("tasks/t/task.json", "task t"),
    ],
)
def test_a_table_of_another_script_model_or_task_is_refused(lesson, file, what):
    (lesson / file).write_bytes(b'{"fingerprint": "changed"}')
    with pytest.raises(ValueError, match=rf"another {what} .*run python data/lessons/99/try\.py"):
        runs.read("99/try.jsonl")


@pytest.mark.parametrize(
    ("file", "what"), [("models/m/model.safetensors", "model"), ("tasks/t/task.json", "task t")]
)
def test_what_is_missing_is_named(lesson, file, what):
    (lesson / file).unlink()
    with pytest.raises(ValueError, match=rf"another {what} \(.*, now missing…\); run python"):
        runs.read("99/try.jsonl")


def test_a_table_that_was_never_trained_is_refused(lesson):
    (lesson / "lessons/99/try.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"has not been trained; run python data/lessons/99/try\.py"):
        runs.read("99/try.jsonl")


def test_a_table_that_was_stopped_is_refused(lesson):
    header, rows = runs.read("99/try.jsonl")
    rows = [row for row in rows if (row["way"], row["seed"]) != ("b", 1)]
    with pytest.raises(
        ValueError, match=r"\('b',\) at lr=2 lacks the seeds \[1\]; run .*try\.py, which goes on"
    ):
        runs.best(header, rows)


def test_the_rates_that_were_tried_can_be_read(lesson):
    found = runs.searched(*runs.read("99/try.jsonl"))
    assert {case: list(tried) for case, tried in found.items()} == {("a",): [1, 2, 3], ("b",): [1, 2, 3]}
    assert found["a",][2] == pytest.approx(1.0075)


def test_rows_stand_in_the_order_of_the_cases(lesson):
    _, rows = runs.read("99/try.jsonl")
    keys = [(row["way"], row["lr"], row["seed"]) for row in rows]
    order = {seed: i for i, seed in enumerate((7, 8, 0, 1))}
    assert keys == sorted(keys, key=lambda key: (key[0], key[1], order[key[2]]))


def test_a_seed_draws_the_same_examples_and_another_draws_others():
    first, other = (runs.drawn("campus-nano", "sentiment", 5, seed) for seed in (0, 1))
    runs.drawn.cache_clear()
    again = runs.drawn("campus-nano", "sentiment", 5, 0)
    as_lists = [[e["input_ids"].tolist() for e in examples] for examples in (first, again, other)]
    assert as_lists[0] == as_lists[1] != as_lists[2]
    model, splits = runs.prepared("campus-nano", "sentiment")
    assert model.config.num_labels == 2
    assert set(splits) == {"train", "validation", "test"}


def test_scores_say_what_evaluate_says_and_what_training_forgets():
    base, splits = runs.prepared("campus-nano", "verdicts")
    model = copy.deepcopy(base)
    pefttutor.fit(model, splits["train"], steps=10, batch_size=16, lr=3e-3, progress=False)
    found = runs.scores(model, "campus-nano", "verdicts")
    assert found["test"] == pefttutor.evaluate(model, splits["test"])["accuracy"]
    assert found["validation"] == pefttutor.evaluate(model, splits["validation"])["accuracy"]
    assert found["forgotten"] > 0.1
    assert runs.scores(model, "campus-nano", "verdicts", searching=True) == {
        "validation": found["validation"]
    }


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ('"""Doc."""\n\n\ndef train(lr):\n    # why\n    return {"x": [lr, 1.0]}\n', True),
        ('def train(lr):\n    "Other words."\n    return {\n        "x": [lr, 1.0],\n    }\n', True),
        ('def train(lr):\n    return {"x": [lr, 1.5]}\n', False),
        ('def train(lr):\n    return {"x": [lr, True]}\n', False),
        ('def train(lr, /):\n    return {"x": [lr, 1.0]}\n', False),
    ],
)
def test_what_a_script_computes_is_its_provenance_and_not_how_it_is_written(tmp_path, other, same):
    script = tmp_path / "try.py"
    script.write_text('"""Its docstring."""\ndef train(lr): return {"x": [lr, 1.0]}\n')
    before = digests(script, "none", ())
    script.write_text(other)
    assert (digests(script, "none", ()) == before) is same
    assert before["model_sha256"] == "missing"


def test_the_adapters_that_a_lesson_ships_are_those_of_their_card():
    folder = root() / "lessons" / "06" / "adapters"
    card = (folder / "README.md").read_text(encoding="utf-8")
    named = dict(re.findall(r"^\| (\w+) \| `([0-9a-f]{64})` \|$", card, re.MULTILINE))
    files = {path.parent.name: path for path in folder.glob("*/adapter.safetensors")}
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == named
    assert len(named) == 4
