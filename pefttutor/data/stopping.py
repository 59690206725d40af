"""`stops`: does a tuned model end its answers by itself? If not, the likely cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pefttutor.data.batches import Example
from pefttutor.data.encoding import answer_ids
from pefttutor.data.generation import continued, ends, speaks
from pefttutor.data.targets import IGNORED
from pefttutor.data.trial import evaluating

__all__ = ["Stops", "padding_learned", "stops"]


@dataclass(frozen=True)
class Stops:
    """What `stops` found. ended: for each prompt, whether its answer ended within max_new_tokens. causes: what is
    likely wrong, each with what to do."""

    ended: tuple[bool, ...]
    max_new_tokens: int
    causes: tuple[str, ...]

    @property
    def share(self) -> float:
        """The share of the answers that ended."""
        return sum(self.ended) / len(self.ended)

    def __repr__(self) -> str:
        first = f"{sum(self.ended)} of {len(self.ended)} answers end within {self.max_new_tokens} tokens"
        return "\n".join([first, *(f"→ {cause}" for cause in self.causes)])


def stops(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Any],
    *,
    examples: Sequence[Example] = (),
    max_new_tokens: int | None = None,
    batch_size: int = 32,
) -> Stops:
    """Let a model answer some prompts, greedily, and count the answers that end with an end token.

    >>> from pefttutor.models import load
    >>> stops(*load("campus-nano"), [{"prompt": "Say it:", "answer": " yes"}])          # nobody has tuned it
    0 of 1 answers end within 6 tokens
    → it hasn't learned to end: train longer, on answers that end as encode ends them

    rows: prompts, or rows with a prompt and its answer. examples: what it was trained on, to look for end tokens
        among the labels.
    max_new_tokens: None allows twice the longest answer and its end, or 64 where no answer is given.

    Cost: that of generating; a model that doesn't stop takes all of max_new_tokens.
    Raises: ValueError without rows, or for a model that doesn't generate.
    """
    if len(rows) == 0:
        raise ValueError("rows is empty; expected prompts, or rows with a prompt and its answer")
    if not speaks(model):
        raise ValueError(f"{type(model).__name__} can't answer in words; expected a causal language model")
    asked = [row if isinstance(row, Mapping) else {"prompt": row} for row in rows]
    answers = [answer_ids(tokenizer, row["prompt"], row["answer"]) for row in asked if "answer" in row]
    longest = 1 + max(map(len, answers), default=31)
    limit = 2 * longest if max_new_tokens is None else max_new_tokens
    prompts = [row["prompt"] for row in asked]
    with evaluating(model):
        found = continued(model, tokenizer, prompts, max_new_tokens=limit, batch_size=batch_size)
    ended = tuple(end for _, end in found)
    causes = _standing(model, tokenizer, examples)
    if not all(ended) and answers and limit < longest:
        causes.append(
            f"max_new_tokens is {limit}, and the longest answer takes {longest} with its end: raise it"
        )
    if not all(ended) and not causes:
        causes.append("it hasn't learned to end: train longer, on answers that end as encode ends them")
    return Stops(ended, limit, tuple(causes))


def _standing(model: Any, tokenizer: Any, examples: Sequence[Example]) -> list[str]:
    """What is wrong whatever the model answers."""
    closing, token = ends(model, tokenizer), tokenizer.eos_token_id
    if not closing:
        return [
            "neither the tokenizer nor generation_config has an end token: set tokenizer.eos_token, encode again, train"
        ]
    causes = []
    own = getattr(model.generation_config, "eos_token_id", None)
    if token is not None and token not in (own if isinstance(own, (list, tuple)) else [own]):
        causes.append(
            f"generation_config.eos_token_id is {own}, so model.generate goes on after {tokenizer.eos_token}: "
            f"model.generation_config.eos_token_id = {token}"
        )
    without = sum(1 for example in examples if not set(closing) & set(example["labels"].flatten().tolist()))
    if without:
        same = " Padding is the same token: did a collator take both for padding?"
        causes.append(
            f"no end token is among the labels of {without} of {len(examples)} examples: "
            f"encode(rows, tokenizer) puts it there.{same if tokenizer.pad_token_id in closing else ''}"
        )
    return causes


def padding_learned(batch: Mapping[str, Any]) -> int:
    """How many labels stand on padding, where attention_mask is 0.

    >>> from torch import tensor
    >>> padding_learned({"labels": tensor([[5, 0]]), "attention_mask": tensor([[1, 0]])})
    1

    Shapes: labels and attention_mask (batch, seq), or (seq,); other labels have none on padding.
    """
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if labels is None or mask is None or labels.shape != mask.shape:
        return 0
    return int(((labels != IGNORED) & (mask == 0)).sum())
