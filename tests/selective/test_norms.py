"""LayerNormTuning: which normalisations, against HF PEFT, and folding their scale away."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pefttutor import (
    LayerNormTuning,
)


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_norms_are_those_that_peft_tunes(kind, tiny, batch):
    from peft import LNTuningConfig, get_peft_model

    names = {
        "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
        "bert": ["LayerNorm"],
        "gpt2": ["ln_1", "ln_2", "ln_f"],
    }[kind]
    ours, inputs = LayerNormTuning().attach(tiny(kind)), batch(kind)
    theirs = get_peft_model(tiny(kind), LNTuningConfig(target_modules=names))
    ours(**inputs).loss.backward()
    theirs(**inputs).loss.backward()
    expected = {
        n.removeprefix("base_model.model.").replace(".ln_tuning_layers.default", ""): p.grad
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    got = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert set(got) == set(expected)
    assert LayerNormTuning().count(tiny(kind)) == sum(g.numel() for g in got.values())
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad)


def test_a_scale_can_be_folded_into_the_next_layer():
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(5, bias=False), nn.Linear(5, 3)
    norm.weight.data.copy_(torch.randn(5))
    x = torch.randn(4, 5)
    expected = linear(norm(x))
    linear.weight.data.mul_(norm.weight.data)
    norm.weight.data.fill_(1)
    torch.testing.assert_close(linear(norm(x)), expected)


def test_a_model_without_norms_says_what_it_has():
    with pytest.raises(ValueError, match="no LayerNorm or RMSNorm with weights of its own among Linear"):
        LayerNormTuning().attach(nn.Linear(2, 2))
