"""Virtual tokens go through a model as words do, or are refused; what one call leaves behind is in no copy."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from pefttutor.parts.virtual_tokens import put_before
from tests.cases import answer
from tests.pictures import differences, picture
from tests.tiny import tiny_batch, tiny_model


def made_of_two(body: nn.Module) -> torch.Tensor:
    """Not a leaf: what is left of a call can't be copied."""
    return body.get_parameter("half_of_it") * 2


def lengthened(model: nn.Module) -> nn.Module:
    half = nn.Parameter(torch.ones(2, 24))
    put_before(
        model, 2, made_of_two, {"half_of_it": half}, note="half_of_it", what="this stands before a text's"
    )
    return model


def test_a_copy_made_after_a_call_that_failed_is_free_of_it():
    model, batch = lengthened(tiny_model("llama")), tiny_batch("llama")
    expected = answer(model, batch)
    handle = model.model.layers[0].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    handle.remove()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert torch.equal(answer(again, batch), expected)


def test_a_model_that_gets_its_words_in_another_way_is_refused():
    model = tiny_model("llama")
    model.model.get_input_embeddings = lambda: nn.Embedding(97, 24)  # not the one that it calls
    with pytest.raises(ValueError, match=r"gives \(1, 5, 24\) for 3 tokens and 2 virtual ones.*as words do"):
        lengthened(model)


def test_what_says_of_itself_that_it_reads_tokens_and_does_not_is_refused_as_it_was():
    model = tiny_model("net")
    before = picture(model)
    with pytest.raises(
        ValueError, match="this stands before a text's tokens, and a Net has none that it tells of"
    ):
        lengthened(model)
    assert differences(before, picture(model)) == []
