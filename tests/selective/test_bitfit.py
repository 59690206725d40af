"""BitFit: which biases, how many, and what a bias can do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from pefttutor import (
    BitFit,
    trainable,
)
from tests.tiny import (
    llama,
)


@pytest.mark.parametrize(
    ("cls", "config", "layers", "d", "ff", "expected"),
    [
        (BertModel, BertConfig(), 12, 768, 3072, 102_912),
        (BertModel, BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                               intermediate_size=4096), 24, 1024, 4096, 272_384),
        (RobertaModel, RobertaConfig(), 12, 768, 3072, 102_912),
    ],
)  # fmt: skip
def test_bitfit_counts_are_the_published_ones(cls, config, layers, d, ff, expected):
    with torch.device("meta"):
        model = cls(config)
    assert BitFit().count(model) == layers * (7 * d + ff) + 2 * d == expected
    if cls is BertModel:
        assert BitFit(target_modules=("query", "intermediate.dense")).count(model) == layers * (d + ff)
    BitFit().attach(model)
    assert sum(trainable(model).values()) == expected
    assert all(name.endswith("bias") for name in trainable(model))


def test_a_key_bias_gets_no_gradient(tiny, batch):
    model = BitFit().attach(tiny("bert", dtype=torch.float64))
    model(**batch("bert")).loss.backward()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            size = p.grad.abs().max()
            assert size < 1e-15 if "key" in name else size > 1e-6, name


def test_a_linear_net_is_linear_in_its_biases():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    BitFit().attach(model)
    x, change = torch.randn(5, 3).double(), torch.randn(4).double()
    y0 = model(x)
    outputs = []
    for factor in (1, 2):
        moved = copy.deepcopy(model)
        moved[0].bias.data.add_(factor * change)
        outputs.append(moved(x) - y0)
    torch.testing.assert_close(outputs[1], 2 * outputs[0])


def test_only_the_biases_of_the_targets_train():
    model = BitFit(target_modules=("q_proj", "down_proj")).attach(llama())
    names = {n for n, _ in llama().named_parameters() if n.endswith(("q_proj.bias", "down_proj.bias"))}
    assert set(trainable(model)) == names
    assert (
        BitFit(target_modules=("q_proj", "down_proj")).count(llama())
        == sum(trainable(model).values())
        == 2 * 2 * 16
    )


def test_bitfit_on_a_model_without_biases_says_what_to_do():
    model = llama(attention_bias=False, mlp_bias=False)
    with pytest.raises(ValueError, match=r"no bias .*LayerNormTuning"):
        BitFit().attach(model)
    with pytest.raises(ValueError, match=r"none of model\.norm has a bias"):
        BitFit(target_modules=("model.norm",)).attach(llama())
    assert all(p.requires_grad for p in model.parameters())
