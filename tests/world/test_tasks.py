"""The embedded tasks are what their generator draws, split without leaks."""

import json

import pytest
from world import domains, tasks

NAMES = [t.name for t in tasks.ALL]
BY_NAME = {t.name: t for t in tasks.ALL}


def test_there_are_at_least_twelve_scored_tasks_and_four_corpora():
    assert sum(t.metric != "perplexity" for t in tasks.ALL) >= 12
    assert {t.name for t in tasks.ALL if t.metric == "perplexity"} == {
        "bank_text",
        "clinic_text",
        "velan_text",
        "world_text",
    }
    assert len(set(NAMES)) == len(NAMES) == len({t.seed for t in tasks.ALL})


@pytest.mark.parametrize("name", NAMES)
def test_stored_files_are_what_the_generator_draws(name):
    task, fresh = BY_NAME[name], tasks.draw_splits(BY_NAME[name])
    about = json.loads((tasks.TASKS / name / "task.json").read_text(encoding="utf-8"))
    assert about["fingerprint"] == tasks.fingerprint(fresh)
    assert tasks.read(task) == fresh
    assert json.loads((tasks.TASKS / name / "subsets.json").read_text()) == tasks.subsets(task)


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_example(name):
    stored = tasks.read(BY_NAME[name])
    keys = {split: {json.dumps(row, sort_keys=True) for row in rows} for split, rows in stored.items()}
    assert [len(stored[s]) for s in ("train", "validation", "test")] == list(BY_NAME[name].sizes)
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["validation"]
    assert not keys["validation"] & keys["test"]


def test_small_versions_are_nested():
    for task in tasks.ALL:
        s = tasks.subsets(task)
        assert s["64"][:16] == s["16"]
        assert s["256"][:64] == s["64"]
        assert len(set(s["256"])) == 256


def test_instructions_of_the_test_are_phrased_as_never_in_training():
    stored = tasks.read(BY_NAME["instruct"])

    def heads(rows):
        return {" ".join(str(r["prompt"]).split()[:3]) for r in rows}

    assert len({r["instruction"] for r in stored["test"]}) >= 8
    assert not heads(stored["test"]) & heads(stored["train"])


def test_memory_asks_for_trained_keys_in_untrained_words():
    stored = tasks.read(BY_NAME["memory"])
    answers = {r["answer"] for r in stored["train"]}
    prompts = {r["prompt"] for r in stored["train"]}
    assert all(r["answer"] in answers and r["prompt"] not in prompts for r in stored["test"])


def test_the_clinics_ceiling_is_the_rule_without_noise():
    rows = [r for split in tasks.read(BY_NAME["clinic"]).values() for r in split]

    def rule(row):
        points = 2 * (row["fever"] == "yes") + 2 * (row["pulse"] >= 100) + (row["age"] >= 65)
        return int(points - (row["rash"] == "yes") - (row["known"] == "yes") >= 2)

    agreement = sum(rule(r) == r["label"] for r in rows) / len(rows)
    assert agreement == pytest.approx(1 - domains.CLINIC_NOISE, abs=0.015)
