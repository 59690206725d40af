"""`score`: one number a task, for models with a head and for models that answer in words."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pefttutor.data.batches import collate, predicts_next
from pefttutor.data.encoding import answer_ids, encode, prompt_ids
from pefttutor.data.evaluation import evaluate
from pefttutor.data.sql import same_result

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
    execution_accuracy: both queries return the same rows from the task's database (see `pefttutor.data.sql`).
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
    """Every row with every label word behind it; the mean keeps words of several tokens comparable.

    A prompt is read once: the label words go on from its cached keys and values.
    """
    if not info.labels:
        raise ValueError(f"{info.name!r} has no labels to choose from")
    prompts, blanks = zip(*(prompt_ids(tokenizer, row["prompt"]) for row in rows), strict=True)
    answers = {b: [answer_ids(tokenizer, b, word) for word in info.labels] for b in set(blanks)}
    room = max_length - max(len(answer) for words in answers.values() for answer in words)
    right = 0
    for b in answers:  # in practice all prompts end in the same blanks
        chosen = sorted((i for i in range(len(rows)) if blanks[i] == b), key=lambda i: len(prompts[i]))
        for start in range(0, len(chosen), batch_size):
            batch = chosen[start : start + batch_size]
            means = _continued(model, tokenizer, [prompts[i][-room:] for i in batch], answers[b])
            best = means.argmax(1).tolist()
            right += sum(best[k] == int(rows[i]["label"]) for k, i in enumerate(batch))
    return right / len(rows)


def _continued(model: Any, tokenizer: Any, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
    """Mean log-probability of each answer's tokens after each prompt: (prompts, answers)."""
    device, pad = next(model.parameters()).device, tokenizer.pad_token_id or 0
    read = collate(
        [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in map(torch.tensor, prompts)],
        pad,
        "left",
    )
    ids, mask = read["input_ids"].to(device), read["attention_mask"].to(device)
    places = (mask.cumsum(-1) - 1).clamp(min=0)  # (prompts, seq)
    out = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True)
    words = _pad_right(answers, device)  # (answers, longest), −100 behind the end
    n, k, longest = len(prompts), *words.shape
    first = out.logits[:, -1].float().log_softmax(-1)[:, words[:, 0]]  # (prompts, answers)
    if longest == 1:
        return first
    name = "cache" if "cache" in out else "past_key_values"  # transformers renamed it in 5.24
    cache = {name: out[name]}
    cache[name].batch_repeat_interleave(k)
    given = words[:, :-1].clamp(min=0).repeat(n, 1)  # (prompts · answers, longest − 1)
    mask = torch.cat([mask.repeat_interleave(k, 0), torch.ones_like(given)], 1)
    after = places[:, -1:].repeat_interleave(k, 0) + torch.arange(1, longest, device=device)
    logits = model(input_ids=given, attention_mask=mask, position_ids=after, **cache).logits
    rest = words[:, 1:].repeat(n, 1)
    taken = logits.float().log_softmax(-1).gather(-1, rest.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    summed = (taken * (rest != -100)).sum(1).view(n, k) + first
    return summed / (words != -100).sum(1)


def _pad_right(sequences: list[list[int]], device: torch.device) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(s, device=device) for s in sequences], batch_first=True, padding_value=-100
    )
