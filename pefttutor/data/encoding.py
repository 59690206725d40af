"""From text to tensors: `encode` the rows of one split."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pefttutor.data.batches import IGNORED, Example


def prompt_ids(tokenizer: Any, prompt: str) -> tuple[list[int], str]:
    """Token numbers of a prompt, and the blanks at its end, which belong to the answer's first token.

    BPE puts a blank into the word that follows it, so "Answer: " + "yes" is "Answer:" + " yes". Cutting there
    makes training, scoring and generating see the same tokens.
    """
    text = prompt.rstrip(" ")
    ids = list(tokenizer(text)["input_ids"])
    closing = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    if ids and ids[-1] in closing and not text.endswith(tokenizer.decode(ids[-1:])):
        ids.pop()  # a tokenizer that closes every text would end the prompt before the answer
    return ids, prompt[len(text) :]


def answer_ids(tokenizer: Any, blanks: str, answer: str) -> list[int]:
    """Token numbers of an answer that follows `prompt_ids`."""
    return list(tokenizer(blanks + answer, add_special_tokens=False)["input_ids"])


def encode(split: Any, tokenizer: Any, *, kind: str | None = None, max_length: int = 256) -> list[Example]:
    """Turn the rows of a split into 1-D tensors for `pefttutor.fit`.

    classification: `text` → input_ids, attention_mask; labels = the class (a scalar).
    generation (and "lm"): input_ids = prompt + answer + </s>; labels = the same, −100 on the prompt.
    tagging: `tokens` → input_ids; labels = the tag on each word's last piece, −100 on the others: a causal
        model knows an ending only once it has read it.

    kind=None takes classification when there are `text` and `label`, tagging when there are `tags`, else
    generation. What is longer than `max_length` loses the end of a text but the start of a prompt.

    Shapes: input_ids, attention_mask (seq,); labels () or (seq,).
    Raises: ValueError for an unknown kind or a missing column, with the columns that exist.
    """
    columns = list(getattr(split, "column_names", None) or (split[0].keys() if len(split) else []))
    if kind is None:
        kind = _guess_kind(columns)
    encoders = {
        "classification": (_encode_text, ("text", "label")),
        "generation": (_encode_prompt, ("prompt", "answer")),
        "lm": (_encode_prompt, ("prompt", "answer")),
        "tagging": (_encode_words, ("tokens", "tags")),
    }
    if kind not in encoders:
        raise ValueError(f"kind={kind!r} is unknown; expected one of {', '.join(encoders)}")
    encoder, needed = encoders[kind]
    if len(split) and not set(needed) <= set(columns):
        raise ValueError(
            f"kind={kind!r} needs the columns {', '.join(needed)}; this split has {', '.join(columns)}"
        )
    return [encoder(row, tokenizer, max_length) for row in split]


def _guess_kind(columns: Sequence[str]) -> str:
    if {"text", "label"} <= set(columns):
        return "classification"
    return "tagging" if "tags" in columns else "generation"


def _encode_text(row: dict[str, Any], tokenizer: Any, max_length: int) -> Example:
    ids = tokenizer(row["text"], truncation=True, max_length=max_length)["input_ids"]
    return _example(ids, torch.tensor(int(row["label"])))


def _encode_prompt(row: dict[str, Any], tokenizer: Any, max_length: int) -> Example:
    prompt, blanks = prompt_ids(tokenizer, row["prompt"])
    answer = answer_ids(tokenizer, blanks, row["answer"])
    if tokenizer.eos_token_id is not None:
        answer.append(tokenizer.eos_token_id)
    answer = answer[: max_length - 1]  # at least one token must stand before the answer to predict it
    prompt = prompt[max(0, len(prompt) + len(answer) - max_length) :]
    return _example(prompt + answer, torch.tensor([IGNORED] * len(prompt) + answer))


def _encode_words(row: dict[str, Any], tokenizer: Any, max_length: int) -> Example:
    if len(row["tokens"]) != len(row["tags"]):
        raise ValueError(
            f"a row has {len(row['tokens'])} tokens but {len(row['tags'])} tags: {row['tokens'][:5]} …"
        )
    ids = prompt_ids(tokenizer, "")[0]  # <s>, where the tokenizer begins a text so
    labels = [IGNORED] * len(ids)
    for position, (word, tag) in enumerate(zip(row["tokens"], row["tags"], strict=True)):
        pieces = answer_ids(tokenizer, " " if position else "", word)
        ids += pieces
        labels += [IGNORED] * (len(pieces) - 1) + [int(tag)]
    return _example(ids[:max_length], torch.tensor(labels[:max_length]))


def _example(ids: list[int], labels: Tensor) -> Example:
    input_ids = torch.tensor(ids, dtype=torch.long)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
