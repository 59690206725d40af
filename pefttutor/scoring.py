"""`score`: one number a task, for models with a head and for models that answer in words."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pefttutor.encoding import answer_ids, collate, encode, predicts_next, prompt_ids
from pefttutor.evaluation import evaluate
from pefttutor.sql import same_result

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

    accuracy: by the head of a classification model; a causal language model chooses the label word to which it
        gives the largest mean log-probability a token, after the row's prompt.
    exact_match: the greedy answer equals the row's, blanks at the ends and doubled ones aside. Where the row's
        answer is one line, only the first line of the model's counts.
    execution_accuracy: both queries return the same rows from the task's database (see `pefttutor.sql`).
    token_accuracy: by the head of a tagging model.
    perplexity: exp of the mean loss a token, which is no share: smaller is better, and 1 is the best.

    limit: only the first rows. max_new_tokens: None allows what the longest answer of the split takes.
    The model's mode is kept, and no random number is drawn.

    Raises: ValueError for an empty split, an unknown metric, or a model that can't do the task.
    """
    rows = [split[i] for i in range(len(split) if limit is None else min(limit, len(split)))]
    if not rows:
        raise ValueError(f"nothing to score: the split has {len(split)} rows and limit={limit}")
    if info.metric not in METRICS:
        raise ValueError(
            f"metric={info.metric!r} of {info.name!r} is unknown, expected one of {', '.join(METRICS)}"
        )
    mode = model.training
    model.eval()
    try:
        if info.metric == "token_accuracy" or (info.metric == "accuracy" and not predicts_next(model)):
            wanted = (
                "ForTokenClassification" if info.metric == "token_accuracy" else "ForSequenceClassification"
            )
            if not type(model).__name__.endswith(wanted):
                head = "tagging" if info.metric == "token_accuracy" else "classification"
                raise ValueError(
                    f"{type(model).__name__} can't do {info.name!r}; expected a model …{wanted}, "
                    f"made by pefttutor.models.load(…, head={head!r})"
                )
            examples = encode(rows, tokenizer, kind=info.kind, max_length=max_length)
            return evaluate(model, examples, batch_size=batch_size)["accuracy"]
        if not predicts_next(model):
            raise ValueError(
                f"{type(model).__name__} can't answer in words; expected a causal language model"
            )
        if info.metric == "perplexity":
            examples = encode(rows, tokenizer, kind="generation", max_length=max_length)
            return math.exp(evaluate(model, examples, batch_size=batch_size)["loss"])
        if info.metric == "accuracy":
            return _label_words(model, tokenizer, rows, info, batch_size, max_length)
        answers = generate(
            model, tokenizer, [row["prompt"] for row in rows], batch_size=batch_size, max_length=max_length,
            max_new_tokens=max_new_tokens or _longest(tokenizer, rows, info.metric),
        )  # fmt: skip
        right = [_is_right(answer, row, info) for answer, row in zip(answers, rows, strict=True)]
        return sum(right) / len(right)
    finally:
        model.train(mode)


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int = 32,
    max_length: int = 512,
) -> list[str]:  # fmt: skip
    """Greedy continuations, up to </s>; batched with padding on the left, with a key-value cache.

    Prompts of similar length share a batch. A prompt longer than `max_length` loses its start.
    """
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id or 0
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, use_cache=True, pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    encoded = [torch.tensor(prompt_ids(tokenizer, prompt)[0][-max_length:]) for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    answers = [""] * len(encoded)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate(
            [{"input_ids": encoded[i], "attention_mask": torch.ones_like(encoded[i])} for i in chosen],
            pad,
            "left",
        )
        made = model.generate(
            **{key: value.to(device) for key, value in batch.items()}, generation_config=greedy
        )
        texts = tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text
    return answers


def _longest(tokenizer: Any, rows: Sequence[dict[str, Any]], metric: str) -> int:
    """Tokens of the longest answer and one for </s>; a query may be right in twice as many."""
    longest = max(len(answer_ids(tokenizer, " ", row["answer"])) for row in rows)
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


@torch.no_grad()
def _label_words(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], info: Any, batch_size: int, max_length: int
) -> float:
    """Every row with every label word behind it; the mean keeps words of several tokens comparable."""
    if not info.labels:
        raise ValueError(f"{info.name!r} has no labels to choose from")
    examples = []
    for row in rows:
        prompt, blanks = prompt_ids(tokenizer, row["prompt"])
        for word in info.labels:
            answer = answer_ids(tokenizer, blanks, word)
            kept = prompt[max(0, len(prompt) + len(answer) - max_length) :]
            ids = torch.tensor(kept + answer)
            labels = torch.tensor([-100] * len(kept) + answer)
            examples.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    means = torch.empty(len(examples))
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    device = next(model.parameters()).device
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([examples[i] for i in chosen], tokenizer.pad_token_id)
        batch = {key: value.to(device) for key, value in batch.items()}
        labels = batch.pop("labels")
        means[torch.tensor(chosen)] = _mean_log_probability(model(**batch).logits, labels).cpu()
    best = means.view(len(rows), len(info.labels)).argmax(1)  # (rows,)
    return sum(int(b) == int(row["label"]) for b, row in zip(best, rows, strict=True)) / len(rows)


def _mean_log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """(batch, seq, vocabulary), (batch, seq) → (batch,): mean over the labels that are not −100."""
    logits, labels = logits[:, :-1].float(), labels[:, 1:]
    counted = labels != -100
    taken = (
        logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    )  # (batch, seq − 1)
    return (taken * counted).sum(1) / counted.sum(1)
