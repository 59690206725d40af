"""Published numbers of parameters, exact (methods.md 3.1, each with its source there)."""

import copy

import pytest
import torch
import transformers as hf

import pefttutor
from pefttutor.memory import estimate
from pefttutor.memory.meta import with_method as attached
from tests.memory.models import mt0, t0_3b


@pytest.mark.parametrize(
    ("published", "formula"),
    [
        (45_088_768, 11_008 * 4_096),  # chapter: LLaMA2-7B, one feed-forward matrix
        (20_480, 5 * 4_096),  # Lester 2021: T5-XXL, prompt of 5
        (1_081_344, 24 * (2 * 4_096 + 10_240) + 24 * (4 * 4_096 + 10_240)),  # (IA)³ on T5-XXL
        (245_760, 24 * 2 * 5 * 1_024),  # prefix of 5 on GPT-2 medium
    ],
)
def test_parameter_figures_of_what_is_not_built(published, formula):
    assert formula == published


def counted(method, model):
    """By the closed formula and by attaching: a model of the true size without values."""
    attached_to = attached(method, copy.deepcopy(model))
    assert sum(pefttutor.trainable(attached_to).values()) == method.count(model)
    return method.count(model)


def bert(**size):
    with torch.device("meta"):
        return hf.BertModel(hf.BertConfig(**size))


def gpt2(width, layers, heads):
    with torch.device("meta"):
        return hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=width, n_layer=layers, n_head=heads, n_positions=2_048)
        )


def pasta(num_special):
    return pefttutor.PASTA(special_token_ids=(101, 102), num_special=num_special)


def plain_lora(r, *targets):
    return pefttutor.LoRA(r=r, target_modules=targets)


LARGE = {"hidden_size": 1_024, "intermediate_size": 4_096, "num_hidden_layers": 24, "num_attention_heads": 16}
XXL = {"hidden_size": 1_536, "intermediate_size": 6_144, "num_hidden_layers": 48, "num_attention_heads": 24}


@pytest.mark.parametrize(
    ("published", "method", "size"),
    [
        (102_912, pefttutor.BitFit(), {}),  # BERT-base, pooler with it
        (272_384, pefttutor.BitFit(), LARGE),
        (98_304, pasta(4), LARGE),  # the paper's 0.029 %
        (294_912, plain_lora(8, "query", "value"), {}),  # RoBERTa-base has BERT's shapes
        (4_718_592, plain_lora(16, "query", "value"), XXL),  # DeBERTa-XXL has 48 layers of these
    ],
)
def test_parameter_figures_of_encoders(published, method, size):
    assert counted(method, bert(**size)) == published


@pytest.mark.parametrize(
    ("published", "r", "size"),
    [
        (393_216, 4, (1_024, 24, 16)),  # GPT-2 medium (LoRA's README says 0.35 M)
        (737_280, 4, (1_280, 36, 20)),  # … large (0.77 M there)
        (4_718_592, 1, (12_288, 96, 96)),  # GPT-3 175B
        (37_748_736, 8, (12_288, 96, 96)),
    ],
)
def test_parameter_figures_of_lora_on_gpt(published, r, size):
    """One matrix for query, key and value: r · (d + 3 d), as many as the papers' query and value, 2 · r · (d + d)."""
    assert counted(plain_lora(r, "c_attn"), gpt2(*size)) == published


def test_parameter_figures_of_other_models():
    with torch.device("meta"):
        one_matrix = torch.nn.Sequential(torch.nn.Linear(4_096, 11_008, bias=False))
    assert counted(plain_lora(4, "0"), one_matrix) == 60_416  # chapter: LLaMA2-7B, one feed-forward matrix
    assert counted(plain_lora(8, "q", "v"), t0_3b()) == 4_718_592  # T0_3B: a file of 18.9 MB
    assert sum(p.numel() for p in gpt2(12_288, 96, 96).parameters()) == pytest.approx(175e9, rel=0.005)
    mt0_large = estimate(mt0(d_model=1024, d_ff=2816, num_heads=16), plain_lora(8, "q", "v"))
    assert (mt0_large.values, mt0_large.trained) == (1_231_940_608, 2_359_296)
