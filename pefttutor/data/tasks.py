"""`load`: a task's splits from the embedded tasks, an installed package, a folder or the hub; `info` about it.

`encode` and `collate` turn its rows into tensors, `score` measures a model on them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pefttutor.data.batches import collate
from pefttutor.data.encoding import encode
from pefttutor.data.scoring import score
from pefttutor.models.carriers import TASKS, closest, embedded_names, not_found, root

__all__ = ["TaskInfo", "collate", "encode", "info", "load", "names", "score"]

SPLITS = ("train", "validation", "test")
SMALL = (16, 64, 256)  # sizes of the small-data versions
KINDS = ("classification", "generation", "tagging")


@dataclass(frozen=True, kw_only=True)
class TaskInfo:
    """What a task is: its kind decides how it is encoded, its metric how it is scored."""

    name: str
    kind: str
    labels: tuple[str, ...] | None = None
    metric: str = "accuracy"
    description: str = ""
    folder: Path | None = None  # where its files are; a database is looked for there


ROTTEN_TOMATOES = TaskInfo(
    name="rotten-tomatoes",
    kind="classification",
    labels=("rotten", "fresh"),
    description="Sentences from film reviews by critics (Pang and Lee 2005); does the critic like the film?",
)


def names() -> list[str]:
    """The names of the embedded tasks.

    >>> "sentiment" in names()
    True
    """
    return embedded_names("tasks")


def info(name: str | Path) -> TaskInfo:
    """Kind, labels, metric and description of a task.

    >>> info("sentiment").labels, info("bank_sql").metric
    (('bad', 'good'), 'execution_accuracy')

    Raises: FileNotFoundError, with the names that exist, when nothing is known of it.
    """
    if name == ROTTEN_TOMATOES.name:
        return ROTTEN_TOMATOES
    folder = _folder(str(name))
    if folder is None or not (folder / "task.json").is_file():
        raise not_found(str(name), "tasks", TASKS, ": nothing says what kind of task it is (task.json)")
    fields = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    labels = fields.get("labels")
    known = {k: fields[k] for k in ("name", "kind", "metric", "description") if k in fields}
    return TaskInfo(**known, labels=tuple(labels) if labels else None, folder=folder)


def load(name: str | Path, *, n: int | None = None) -> Any:
    """Load a task as a datasets.DatasetDict with the splits train, validation and test.

    >>> load("sentiment", n=16).num_rows
    {'train': 16, 'validation': 300, 'test': 400}

    name: an embedded task (`names()`), "rotten-tomatoes" when the package that carries it is installed, the path
        of a folder of parquet files, or the id of a data set on the hub.
    n: 16, 64 or 256 take a fixed small part of the training split; each part holds the smaller ones.

    Columns: text, label, prompt, answer (classification); prompt, answer (generation); tokens, tags (tagging).
    Everything is read into memory; no cache is written.
    Raises: FileNotFoundError, with every way to get one, when there is no such task; ValueError for another n, a task
        that has no such part, or a file that can't be read.
    """
    if n is not None and n not in SMALL:
        raise ValueError(f"n={n}, expected one of {', '.join(map(str, SMALL))}, or None for all")
    splits, folder = _splits(str(name))
    if n is not None:
        if "train" not in splits:
            raise ValueError(
                f"n={n} takes a part of the split train, and {name!r} has only {', '.join(splits)}; load it without n, "
                "and select(range(…)) from one of these"
            )
        train = splits["train"]
        if len(train) < n:
            raise ValueError(f"n={n}, but the training split of {name!r} has only {len(train)} examples")
        splits["train"] = train.select(_subset(folder, len(train), n))
    return splits


def _splits(name: str) -> tuple[Any, Path | None]:
    from datasets import DatasetDict

    folder = _folder(name)
    if folder is not None:
        files = {split: found for split in SPLITS if (found := sorted(folder.glob(f"{split}*.parquet")))}
        if "train" not in files:
            restore = f"`git checkout -- data/tasks/{name}`" if name in names() else "save it with to_parquet"
            raise not_found(name, "tasks", TASKS, f": {folder} has no train.parquet; {restore}")
        described = info(name) if (folder / "task.json").is_file() else None
        return DatasetDict({split: _read(paths, described) for split, paths in files.items()}), folder
    if name in TASKS:
        path = TASKS[name].find()
        if path is None:
            raise not_found(name, "tasks", TASKS)
        return _rotten_tomatoes(path), None
    return _from_hub(name), None


def _folder(name: str) -> Path | None:
    if name in names():
        return root() / "tasks" / name
    path = Path(name).expanduser()
    return path if path.is_dir() else None


def _read(paths: list[Path], described: TaskInfo | None) -> Any:
    """Read parquet into memory; `Dataset.from_parquet` would write a second copy into a cache."""
    import pyarrow
    from datasets import ClassLabel, Dataset, Features
    from pyarrow import parquet

    try:
        table = pyarrow.concat_tables([parquet.read_table(path) for path in paths])
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{paths[0]} can't be read as parquet ({error}); restore it, e.g. by git checkout"
        ) from None
    features = Features.from_arrow_schema(table.schema)
    if described is not None and described.labels and "label" in features:
        features["label"] = ClassLabel(names=list(described.labels))
    return Dataset(table.cast(features.arrow_schema))


def _subset(folder: Path | None, examples: int, n: int) -> list[int]:
    """The fixed indices of a small-data version: stored with an embedded task, else drawn from seed 0."""
    if folder is not None and (folder / "subsets.json").is_file():
        stored = json.loads((folder / "subsets.json").read_text())
        if str(n) not in stored:
            raise ValueError(
                f"{folder / 'subsets.json'} has the sizes {', '.join(stored)}, and n={n} is none of them; add its "
                "indices there, or remove the file: then they are drawn"
            )
        return stored[str(n)]
    return torch.randperm(examples, generator=torch.Generator().manual_seed(0))[:n].tolist()


def _rotten_tomatoes(path: Path, seed: int = 0) -> Any:
    """Reviews without plots and doubles; all reviews of a film are in one split, or its name would tell."""
    import pandas
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    table = pandas.read_csv(path).dropna(subset=["text"]).drop_duplicates("text")
    table = table[table["category"].isin(ROTTEN_TOMATOES.labels)]
    films = sorted(table["movie_name"].unique())
    order = torch.randperm(len(films), generator=torch.Generator().manual_seed(seed)).tolist()
    tenth = len(films) // 10
    parts = {"test": order[:tenth], "validation": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
    features = Features(
        text=Value("string"), label=ClassLabel(names=list(ROTTEN_TOMATOES.labels or ())),
        prompt=Value("string"), answer=Value("string"), film=Value("string"),
    )  # fmt: skip
    splits = {}
    for split in SPLITS:
        rows = table[table["movie_name"].isin([films[i] for i in parts[split]])]
        texts, answers = rows["text"].str.strip().tolist(), rows["category"].tolist()
        columns = {
            "text": texts, "label": [(ROTTEN_TOMATOES.labels or ()).index(a) for a in answers],
            "prompt": [f"Review: {text}\nVerdict (rotten or fresh): " for text in texts],
            "answer": answers, "film": rows["movie_name"].tolist(),
        }  # fmt: skip
        splits[split] = Dataset.from_dict(columns, features=features)
    return DatasetDict(splits)


def _from_hub(name: str) -> Any:
    if "/" not in name and closest(name, [*names(), *TASKS]):
        raise not_found(name, "tasks", TASKS)
    if Path(name).is_absolute() or name.startswith("."):
        raise not_found(name, "tasks", TASKS)
    from datasets import load_dataset

    try:
        return load_dataset(name)
    except Exception as error:  # the hub's client has a dozen kinds, and all mean: not to be had
        raise not_found(name, "tasks", TASKS, f" ({str(error).splitlines()[0]})") from error
