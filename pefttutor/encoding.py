"""From text to tensors: `encode` one split, `collate` a batch, and count what a loss averages over."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

IGNORED = -100  # the label that every loss of transformers leaves out
_PADDING = {"labels": IGNORED}  # every other key is padded with 0, input_ids with pad_token_id

Example = dict[str, Tensor]


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


def collate(
    examples: Sequence[Example], pad_token_id: int | None = 0, side: str = "right"
) -> dict[str, Tensor]:
    """Pad 1-D tensors to one length and stack them; scalars are stacked as they are.

    input_ids are padded with `pad_token_id`, labels with −100, everything else (attention_mask) with 0.

    Shapes: n × (seq_i,) → (n, max seq); n × () → (n,).
    Raises: ValueError for an unknown side or examples with different keys.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side={side!r} is unknown; expected 'left' or 'right'")
    keys = list(examples[0])
    for example in examples:
        if set(example) != set(keys):
            raise ValueError(
                f"all examples need the same keys; one has {sorted(example)}, another {sorted(keys)}"
            )
    filling = _PADDING | {"input_ids": pad_token_id or 0}
    return {
        key: _stack([torch.as_tensor(e[key]) for e in examples], filling.get(key, 0), side) for key in keys
    }


def _stack(rows: list[Tensor], value: int, side: str) -> Tensor:
    if rows[0].ndim == 0:
        return torch.stack(rows)
    longest = max(row.shape[0] for row in rows)
    missing = [longest - row.shape[0] for row in rows]
    beside = [0, 0] * (
        rows[0].ndim - 1
    )  # pad() counts from the last dimension; the first one is the sequence
    sides = [[gap, 0] if side == "left" else [0, gap] for gap in missing]
    return torch.stack([pad(row, beside + s, value=value) for row, s in zip(rows, sides, strict=True)])


def predicts_next(model: Any) -> bool:
    """Whether the model's own loss compares position t with label t + 1, as causal language models do."""
    return getattr(model, "loss_type", None) == "ForCausalLM" or type(model).__name__.endswith("LMHeadModel")


def count_targets(batch: dict[str, Any], *, shifted: bool) -> int:
    """How many terms the mean of a loss has: examples for class labels, else labels that are not −100.

    `shifted` says that the first position's label has no prediction (`predicts_next`).
    """
    labels = batch.get("labels")
    if labels is None:
        return len(next(iter(batch.values())))
    if labels.ndim < 2 or labels.is_floating_point():
        return int((labels != IGNORED).sum()) if not labels.is_floating_point() else len(labels)
    return int((labels[:, 1:] if shifted else labels).ne(IGNORED).sum())
