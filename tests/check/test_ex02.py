"""The checks of notebook 02 take a right answer, however it is written, and reject wrong ones (see test_mistakes)."""

import math

import pytest
import torch

from pefttutor import check
from pefttutor.check.ex02 import _Mixed
from pefttutor.check.ex02_answers import feed_forward_bytes, kv_cache_bytes, static_bytes
from tests.check.rejection import reason


def by_nbytes(model, moment_bytes):
    """Right, as a list, with a tensor in it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = torch.tensor([p.numel() for p in trained]).sum() * 2 * moment_bytes
    return [sum(p.nbytes for p in model.parameters()), sum(p.nbytes for p in trained), moments]


def by_name(model, moment_bytes):
    parameters = dict(model.named_parameters()).values()
    widths = {torch.float32: 4.0, torch.bfloat16: 2.0}
    weights = sum(widths[p.dtype] * math.prod(p.shape) for p in parameters)
    gradients = sum(widths[p.dtype] * math.prod(p.shape) for p in parameters if p.requires_grad)
    return weights, gradients, sum(moment_bytes * 2 * p.numel() for p in parameters if p.requires_grad)


def kept_case_by_case(tokens, d, m, itemsize, weights_train, input_grad):
    numbers = 0
    if weights_train:
        numbers += tokens * d  # x
        numbers += tokens * m  # the product
    if weights_train or input_grad:
        numbers += tokens * m + tokens * m + tokens * m  # gate, silu, up
    return float(numbers * itemsize)


def cache_by_layer(layers, heads, kv_heads, head_dim, batch, length, itemsize):
    one = torch.zeros(batch, kv_heads, length, head_dim)
    return sum(2 * one.numel() * itemsize for _ in range(layers))


RIGHT = {
    check.ex02_1: (static_bytes, by_nbytes, by_name),
    check.ex02_2: (feed_forward_bytes, kept_case_by_case),
    check.ex02_3: (kv_cache_bytes, cache_by_layer),
}


@pytest.mark.parametrize(
    ("exercise", "right"), [(e, right) for e, answers in RIGHT.items() for right in answers]
)
def test_right(exercise, right, capsys):
    assert exercise(right) is right
    assert "correct" in capsys.readouterr().out


def detached(tokens, d, m, itemsize, weights_train, input_grad):
    return None


def no_bytes_of_moments(model, moment_bytes):
    weights, gradients, _ = static_bytes(model, moment_bytes)
    return weights, gradients, 0


def a_dictionary(model, moment_bytes):
    return dict(zip(("weights", "gradients", "optimizer"), static_bytes(model, moment_bytes), strict=True))


def rounded_to_mebibytes(**given):
    return kv_cache_bytes(**given) / 2**20


def crashes(**given):
    return given["number_of_layers"]


@pytest.mark.parametrize(
    ("exercise", "attempt", "says"),
    [
        (check.ex02_1, no_bytes_of_moments, "expected"),
        (check.ex02_1, a_dictionary, "came"),
        (check.ex02_2, detached, "doesn't return its result"),
        (check.ex02_3, rounded_to_mebibytes, "expected"),
        (check.ex02_3, crashes, "KeyError"),
    ],
)
def test_other_wrong_answers(exercise, attempt, says):
    assert says in reason(exercise, attempt)


def test_the_models_of_the_first_exercise_are_what_it_says():
    model = _Mixed(("up.bias",))
    assert model.head.weight is model.embed.weight
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["up.bias"]
