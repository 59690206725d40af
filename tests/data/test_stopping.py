"""stops: a model that ends, one that doesn't, and the likely cause of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pefttutor.data import collate, encode, stops
from pefttutor.data.stopping import padding_learned
from pefttutor.train import fit
from tests.data.moods import ROWS, TOKENIZER
from tests.tiny import bert, llama, tokenizer

EXAMPLES = encode(ROWS, TOKENIZER, kind="generation")
HELD = {"examples": EXAMPLES, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def tuned() -> Any:
    """A model that has learned to say "yes" and to stop."""
    rows = [{"prompt": row["prompt"], "answer": "yes"} for row in ROWS]
    model = llama(initializer_range=0.1)
    fit(model, encode(rows, TOKENIZER), steps=40, batch_size=6, lr=1e-2)
    return model


def test_a_model_that_was_tuned_on_answers_with_an_end_stops(tuned: nn.Module) -> None:
    found = stops(
        tuned, TOKENIZER, [{"prompt": row["prompt"], "answer": "yes"} for row in ROWS], examples=EXAMPLES
    )
    assert (found.share, found.causes) == (1.0, ())
    assert repr(found) == f"6 of 6 answers end within {found.max_new_tokens} tokens"
    assert stops(tuned, TOKENIZER, [row["prompt"] for row in ROWS]).max_new_tokens == 64


def test_a_model_that_was_never_tuned_does_not() -> None:
    found = stops(llama(), TOKENIZER, ROWS, **HELD | {"max_new_tokens": None})
    assert found.share == 0
    assert found.causes == (
        "it hasn't learned to end: train longer, on answers that end as encode ends them",
    )


def test_labels_without_an_end() -> None:
    end = TOKENIZER.eos_token_id
    masked = [{**e, "labels": e["labels"].masked_fill(e["labels"] == end, -100)} for e in EXAMPLES[:2]]
    (cause,) = stops(llama(), TOKENIZER, ROWS, **HELD | {"examples": masked + EXAMPLES[2:]}).causes[:1]
    assert (
        cause == "no end token is among the labels of 2 of 6 examples: encode(rows, tokenizer) puts it there."
    )
    same = tokenizer()
    same.pad_token = same.eos_token
    (cause,) = stops(llama(), same, ROWS, **HELD | {"examples": masked}).causes[:1]
    assert cause.endswith("Padding is the same token: did a collator take both for padding?")


@pytest.mark.parametrize("own", [None, 7, [5, 7]])
def test_a_model_whose_own_generate_would_go_on(tuned: Any, own: Any) -> None:
    before = tuned.generation_config.eos_token_id
    tuned.generation_config.eos_token_id = own
    try:
        found = stops(tuned, TOKENIZER, ROWS)
    finally:
        tuned.generation_config.eos_token_id = before
    assert found.share == 1
    (cause,) = found.causes
    assert cause.startswith(
        f"generation_config.eos_token_id is {own}, so model.generate goes on after </s>: "
    )
    assert cause.endswith("model.generation_config.eos_token_id = 2")


def test_no_end_token_at_all() -> None:
    words, model = tokenizer(), llama(eos_token_id=None)
    words.eos_token = model.generation_config.eos_token_id = None
    found = stops(model, words, ROWS, max_new_tokens=2)
    assert found.share == 0
    assert found.causes[0].startswith("neither the tokenizer nor generation_config has an end token")


def test_too_few_tokens_for_the_longest_answer(tuned: nn.Module) -> None:
    found = stops(tuned, TOKENIZER, ROWS, max_new_tokens=1)
    assert found.share == 0
    assert found.causes == ("max_new_tokens is 1, and the longest answer takes 13 with its end: raise it",)
    assert stops(tuned, TOKENIZER, ROWS, max_new_tokens=4).causes == ()  # all have ended before


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="rows is empty; expected prompts, or rows with"):
        stops(llama(), TOKENIZER, [])
    with pytest.raises(ValueError, match="BertForMaskedLM can't answer in words"):
        stops(bert(), TOKENIZER, ROWS)


def test_the_mode_stays_as_it_is(tuned: nn.Module) -> None:
    tuned.train()
    stops(tuned, TOKENIZER, ROWS[:1])
    assert tuned.training
    tuned.eval()


def test_labels_on_padding_are_counted() -> None:
    batch = collate(EXAMPLES, TOKENIZER.pad_token_id)
    assert padding_learned(batch) == 0
    padding = int((batch["attention_mask"] == 0).sum())
    assert padding_learned({**batch, "labels": batch["input_ids"]}) == padding > 0
    assert padding_learned({"labels": torch.tensor([1, 0]), "attention_mask": torch.ones(2, 3)}) == 0
    assert padding_learned({"labels": torch.tensor([1, 0])}) == 0
