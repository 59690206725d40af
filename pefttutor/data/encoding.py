"""From text to tensors: `encode` the rows of one split."""

import warnings
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from pefttutor.data.batches import Example
from pefttutor.data.checks import check_counts
from pefttutor.data.targets import IGNORED


def split_ids(tokenizer: Any, prompt: str, answers: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Token numbers of a prompt, and of each answer behind it, as the tokenizer cuts the joined texts.

    Alone, an answer may get other tokens than behind its prompt: some tokenizers put a blank before every text. And
    the last token of a prompt may go together with what follows, as in "Answer: " + "yes", which is "Answer:" + " yes".
    So the prompt ends where the joined texts and the prompt alone begin to differ, and training, scoring and
    generating see the same tokens.

    >>> from pefttutor.models import load
    >>> _, tokenizer = load("campus-nano")
    >>> prompt, (yes, no) = split_ids(tokenizer, "Answer: ", ["yes", "no"])
    >>> tokenizer.decode(prompt), tokenizer.decode(yes)                 # the blank goes to the answer
    ('<s>Answer:', ' yes')
    """
    alone = open_ids(tokenizer, prompt.rstrip(" "))
    joined = [open_ids(tokenizer, prompt + answer) for answer in answers]
    columns = zip(alone, *joined, strict=False)
    n = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return alone[:n], [ids[n:] for ids in joined]


def prompt_ids(tokenizer: Any, prompt: str) -> tuple[list[int], str]:
    """Token numbers of a prompt alone, and the blanks at its end, which belong to the answer's first token.

    >>> from pefttutor.models import load
    >>> prompt_ids(load("campus-nano")[1], "Answer: ")[1]
    ' '
    """
    text = prompt.rstrip(" ")
    return open_ids(tokenizer, text), prompt[len(text) :]


def answer_ids(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    """Token numbers of an answer that follows the prompt (or the blanks at its end alone); see `split_ids`."""
    return split_ids(tokenizer, prompt, [answer])[1][0]


def open_ids(tokenizer: Any, text: str) -> list[int]:
    """Token numbers of a text that goes on: without the token with which some tokenizers close every text."""
    ids = list(tokenizer(text)["input_ids"])
    closing = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    if ids and ids[-1] in closing and not text.endswith(tokenizer.decode(ids[-1:])):
        ids.pop()
    return ids


def encode(split: Any, tokenizer: Any, *, kind: str | None = None, max_length: int = 256) -> list[Example]:
    """Turn the rows of a split into 1-D tensors for `pefttutor.fit`.

    >>> from pefttutor.models import load
    >>> _, tokenizer = load("campus-nano")
    >>> (example,) = encode([{"prompt": "Say it: ", "answer": "yes"}], tokenizer)
    >>> tokenizer.decode(example["labels"][example["labels"] != IGNORED])              # what is learned
    ' yes</s>'

    classification: `text` → input_ids, attention_mask; labels = the class (a scalar), a number for a regression, or
        a 0 or 1 for each class, where one text may have several.
    generation (and "lm"): input_ids = prompt + answer + </s>; labels = the same, −100 on the prompt. An answer that
        loses its </s> to `max_length` is said in a warning: who learns from it may not learn to stop.
    tagging: `tokens` → input_ids; labels = the tag on each word's last piece, −100 on the others: a causal
        model knows an ending only once it has read it. A word of which the tokenizer leaves nothing has no label.

    kind=None takes classification when there are `text` and `label`, tagging when there are `tags`, else
    generation. What is longer than `max_length` loses the end of a text but the start of a prompt.

    Shapes: input_ids, attention_mask (seq,); labels (), (seq,) or (classes,).
    Raises: ValueError for an unknown kind, a max_length below 1, a missing column, with the columns that exist, or a
        token that belongs to two tagged words.
    """
    check_counts(max_length=max_length)
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
    examples = [encoder(row, tokenizer, max_length) for row in split]
    if encoder is _encode_prompt:
        _say_what_lost_its_end(split, examples, tokenizer, max_length)
    return examples


def _guess_kind(columns: Sequence[str]) -> str:
    if {"text", "label"} <= set(columns):
        return "classification"
    return "tagging" if "tags" in columns else "generation"


def _encode_text(row: dict[str, Any], tokenizer: Any, max_length: int) -> Example:
    ids = tokenizer(row["text"], truncation=True, max_length=max_length)["input_ids"]
    return _example(ids, _label(row["label"]))


def _label(value: Any) -> Tensor:
    """A class is a whole number; measured numbers, and one for each class, are floats."""
    if isinstance(value, str):
        return torch.tensor(int(value))
    label = torch.as_tensor(value)
    return label.float() if label.ndim or label.is_floating_point() else label.long()


def _encode_prompt(row: dict[str, Any], tokenizer: Any, max_length: int) -> Example:
    prompt, (answer,) = split_ids(tokenizer, row["prompt"], [row["answer"]])
    end = tokenizer.eos_token_id
    if end is not None:
        while answer[-1:] == [end]:  # written in the answer, and added by the tokenizer
            answer.pop()
        answer.append(end)
    answer = answer[: max_length - 1]  # at least one token must stand before the answer to predict it
    prompt = prompt[max(0, len(prompt) + len(answer) - max_length) :]
    return _example(prompt + answer, torch.tensor([IGNORED] * len(prompt) + answer))


def _say_what_lost_its_end(split: Any, examples: list[Example], tokenizer: Any, max_length: int) -> None:
    """A piece of running text, which has no prompt, is cut in silence."""
    end = tokenizer.eos_token_id
    asked = [example for row, example in zip(split, examples, strict=True) if row["prompt"]]
    cut = sum(1 for example in asked if end is not None and example["labels"][-1] != end)
    if cut:
        warnings.warn(
            f"{cut} of {len(examples)} answers are longer than max_length={max_length} and have lost their end, "
            f"{tokenizer.eos_token}: a model may not learn from them to stop. Raise max_length, or leave them out.",
            stacklevel=3,
        )


def _encode_words(row: dict[str, Any], tokenizer: Any, max_length: int) -> Example:
    words, tags = row["tokens"], row["tags"]
    if len(words) != len(tags):
        raise ValueError(f"a row has {len(words)} tokens but {len(tags)} tags: {words[:5]} …")
    parts = [open_ids(tokenizer, " ".join(words[:k])) for k in range(len(words) + 1)]
    ids, end = parts[-1], len(parts[0])  # of no word at all: <s>, where the tokenizer begins a text so
    labels = [IGNORED] * len(ids)
    for k, tag in enumerate(tags):
        before, end = end, _end_of(parts[k + 1], ids, end, tokenizer)
        if end < 0:
            raise ValueError(
                f"no token of this tokenizer ends where {words[k]!r} ends before {words[k + 1]!r}, so the two can't "
                "have two tags; expected one that keeps words apart. Take another tokenizer, or make them one word"
            )
        if end > before:  # else nothing is left of the word
            labels[end - 1] = int(tag)
    return _example(ids[:max_length], torch.tensor(labels[:max_length]))


def _end_of(part: list[int], ids: list[int], start: int, tokenizer: Any) -> int:
    """How many of `ids` are the first words, whose tokens alone are `part`; −1 if a token goes on into the next word.

    Alone, the same words may have other tokens: if a blank belongs to the token before it, the last one lacks it.
    """
    if ids[: len(part)] == part:
        return max(start, len(part))
    spelled = tokenizer.decode(part).strip(" ")
    ends = (n for n in range(start, len(ids)) if tokenizer.decode(ids[:n]).strip(" ") == spelled)
    return next(ends, -1)


def _example(ids: list[int], labels: Tensor) -> Example:
    input_ids = torch.tensor(ids, dtype=torch.long)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
