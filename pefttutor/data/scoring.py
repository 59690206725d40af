"""`score`: one number a task, for models with a head and for models that answer in words."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pefttutor.data.checks import check_counts
from pefttutor.data.encoding import answer_ids, encode
from pefttutor.data.evaluation import evaluate
from pefttutor.data.generation import generate, speaks
from pefttutor.data.label_words import likeliest
from pefttutor.data.sql import same_result
from pefttutor.data.targets import predicts_next
from pefttutor.data.trial import evaluating

METRICS = ("accuracy", "exact_match", "execution_accuracy", "token_accuracy", "perplexity")


def score(
    model: Any,
    tokenizer: Any,
    split: Any,
    info: Any,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    max_length: int = 512,
) -> float:
    """The share of examples (tagging: of words) that the model gets right, between 0 and 1.

    >>> from pefttutor.data import TaskInfo; from pefttutor.models import load
    >>> task = TaskInfo(name="taste", kind="classification", labels=("bad", "good"))
    >>> rows = [{"prompt": "Soup was served. Verdict: ", "label": label} for label in (0, 1)]
    >>> score(*load("campus-nano"), rows, task)              # a prompt gets one answer, and here has two labels
    0.5

    accuracy: by the head of a classification model; a causal language model chooses the label word to which it
        gives the largest mean log-probability a token, after the row's prompt.
    exact_match: the greedy answer equals the row's, blanks at the ends and doubled ones aside. Where the row's
        answer is one line, only the first line of the model's counts.
    execution_accuracy: both queries return the same rows from the task's database (see `pefttutor.data.sql`).
    token_accuracy: by the head of a tagging model.
    perplexity: exp of the mean loss a token, which is no share: smaller is better, and 1 is the best.

    limit: only the first rows. max_new_tokens: None allows what the longest answer of the split takes.
    The model's mode is kept, and no random number is drawn.

    Raises: ValueError for an empty split, an unknown metric, a number below 1, or a model that can't do the task.
    """
    check_counts(batch_size=batch_size, max_new_tokens=max_new_tokens, max_length=max_length)
    rows = [split[i] for i in range(len(split) if limit is None else min(limit, len(split)))]
    if not rows:
        raise ValueError(f"nothing to score: the split has {len(split)} rows and limit={limit}")
    if info.metric not in METRICS:
        raise ValueError(
            f"metric={info.metric!r} of {info.name!r} is unknown, expected one of {', '.join(METRICS)}"
        )
    with evaluating(model):
        if info.metric == "token_accuracy" or (info.metric == "accuracy" and not speaks(model)):
            return _by_head(model, tokenizer, rows, info, batch_size, max_length)
        if not speaks(model) or (info.metric == "perplexity" and not predicts_next(model)):
            raise ValueError(
                f"{type(model).__name__} can't answer in words; expected a causal language model"
            )
        if info.metric == "perplexity":
            examples = encode(rows, tokenizer, kind="generation", max_length=max_length)
            return math.exp(evaluate(model, examples, batch_size=batch_size)["loss"])
        prompts = [row["prompt"] for row in rows]
        if info.metric == "accuracy":
            if not info.labels:
                raise ValueError(f"{info.name!r} has no labels to choose from")
            chosen = likeliest(
                model, tokenizer, prompts, info.labels, batch_size=batch_size, max_length=max_length
            )
            right = [k == int(row["label"]) for k, row in zip(chosen, rows, strict=True)]
        else:
            enough = _longest(tokenizer, rows, info.metric) if max_new_tokens is None else max_new_tokens
            answers = generate(
                model, tokenizer, prompts, max_new_tokens=enough, batch_size=batch_size, max_length=max_length
            )
            right = [_is_right(answer, row, info) for answer, row in zip(answers, rows, strict=True)]
        return sum(right) / len(right)


def _by_head(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], info: Any, batch_size: int, max_length: int
) -> float:
    """Accuracy of a classification or tagging model."""
    tags = info.metric == "token_accuracy"
    wanted = "ForTokenClassification" if tags else "ForSequenceClassification"
    if not type(model).__name__.endswith(wanted):
        head = "tagging" if tags else "classification"
        raise ValueError(
            f"{type(model).__name__} can't do {info.name!r}; expected a model …{wanted}, "
            f"made by pefttutor.models.load(…, head={head!r})"
        )
    found = evaluate(
        model, encode(rows, tokenizer, kind=info.kind, max_length=max_length), batch_size=batch_size
    )
    if "accuracy" not in found:
        raise ValueError(
            f"a regression has no accuracy, and {type(model).__name__} is one (num_labels={model.config.num_labels}, "
            f"problem_type={model.config.problem_type!r}). Its loss is evaluate(…)['loss']"
        )
    return found["accuracy"]


def _longest(tokenizer: Any, rows: Sequence[dict[str, Any]], metric: str) -> int:
    """Tokens of the longest answer and one for </s>; a query may be right in twice as many."""
    longest = max(len(answer_ids(tokenizer, row["prompt"], row["answer"])) for row in rows)
    return 1 + longest * (2 if metric == "execution_accuracy" else 1)


def _is_right(answer: str, row: dict[str, Any], info: Any) -> bool:
    wanted, given = row["answer"].strip(), answer.strip()
    if "\n" not in wanted:
        given = given.split("\n")[0]
    if info.metric == "execution_accuracy":
        return same_result(given, wanted, _database(row, info))
    return given.split() == wanted.split()


def _database(row: dict[str, Any], info: Any) -> Path:
    """The file that the row's column `database` names in the task's folder, or the only one there."""
    folder = info.folder or Path()
    if row.get("database"):
        return folder / row["database"]
    found = [path for path in sorted(folder.iterdir()) if path.suffix in (".sql", ".db", ".sqlite")]
    if len(found) != 1:
        raise ValueError(
            f"{info.name!r} has {len(found)} databases in {folder}; expected one, or a column database"
        )
    return found[0]
