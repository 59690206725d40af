"""Choosing the largest: how many exactly, ties, and how many on a model without values."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from pefttutor import (
    ChildTuningD,
    FishDip,
    FishMask,
    PaFi,
    SecondOrderMask,
)
from pefttutor.memory import estimate
from pefttutor.parts.entries import entries
from pefttutor.parts.ranking import exact_share, largest, largest_share
from tests.tiny import (
    class_examples,
    llama,
    llama_classifier,
)


def test_ties_do_not_change_how_many_are_chosen():
    chosen = largest({"a": torch.zeros(3, 4), "b": torch.ones(2)}, 5)
    assert [int(m.sum()) for m in chosen.values()] == [3, 2]
    with pytest.raises(FloatingPointError, match="'b'"):
        largest({"a": torch.zeros(3), "b": torch.tensor([float("nan")])}, 1)


def test_a_fraction_is_the_decimal_that_was_written():
    assert int(exact_share(0.29, 100)) == 29  # 0.29 · 100 is 28.999… in floating point
    assert exact_share(1e-05, 100_000) == 1
    chosen = largest_share({"a": torch.arange(100.0)}, 0.29)["a"]
    assert int(chosen.sum()) == 29
    assert int(largest_share({"a": torch.arange(5.0)}, 0.01)["a"].sum()) == 1


CONFIG = LlamaConfig(
    vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)


METHODS = [
    PaFi(fraction=0.1),
    FishMask(fraction=0.1),
    ChildTuningD(p_D=0.1),
    SecondOrderMask(fraction=0.1, per_tensor=False),
    SecondOrderMask(fraction=0.1),
    FishDip(fraction=0.1),
]


def empty(make, **settings):
    with torch.device("meta"):
        return make(**settings)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_gradients_are_those_of_the_fraction(method):
    model = empty(llama, tie_word_embeddings=False, attention_bias=False, mlp_bias=False)
    tables = {model.model.embed_tokens.weight} if isinstance(method, PaFi) else set()
    n = sum(p.numel() for p in model.parameters() if p not in tables)
    found = estimate(CONFIG, method, batch_size=2, sequence_length=16)
    assert abs(found.gradients / (4 * int(0.1 * n)) - 1) < 0.01
    assert found.optimizer == 2 * found.gradients


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_as_many_train_as_on_the_real_model(method):
    real, without = llama_classifier(), empty(llama_classifier)
    if isinstance(method, PaFi):
        method.attach(real)
    else:
        method.attach(real, class_examples(8))
    method.attach(without)
    assert sum(map(len, entries(real).values())) == sum(map(len, entries(without).values()))
