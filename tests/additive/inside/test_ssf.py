"""SSF against dense autograd of the base with its weights scaled and shifted, and against its published count."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from pefttutor import SSF, Adapter, memory, merge, switch, trainable, unmerge
from tests.cases import ARCHITECTURES, answer, batch_of, fresh, gradients, loss_of, moved
from tests.memory.models import batch_of as batch_for_memory
from tests.memory.models import held
from tests.memory.models import model_of as model_for_memory
from tests.pictures import differences, picture, tensors
from tests.tiny import Quantised, made, tiny_model

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def by_the_formula(base: nn.Module, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """W ← γ ⊙ W and b ← γ ⊙ b + β."""
    made = {}
    for name, leaf in leaves.items():
        path, _, key = name.rpartition(".")
        weights = dict(base.get_submodule(path).named_parameters())
        if key == "ssf_scale":
            rows = weights["weight"].t() if "c_" in path else weights["weight"]  # GPT-2 stores (in, out)
            scaled = torch.einsum("i,i...->i...", leaf, rows)
            made[f"{path}.weight"] = scaled.t() if "c_" in path else scaled
        else:
            made[f"{path}.bias"] = leaves[f"{path}.ssf_scale"] * weights["bias"] + leaf
    return made


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_outputs_and_every_gradient_are_those_of_scaled_and_shifted_weights(kind):
    base, inputs = tiny_model(kind, dtype=F64), batch_of(kind, "left", F64)
    ours = moved(SSF().attach(tiny_model(kind, dtype=F64)))
    leaves = {n: p.detach().clone().requires_grad_() for n, p in ours.named_parameters() if p.requires_grad}
    made = by_the_formula(base, leaves)
    arguments = {"args": (inputs["x"],)} if kind == "net" else {"args": (), "kwargs": inputs}
    output = functional_call(base, made, **arguments)
    loss = F.cross_entropy(output, inputs["labels"]) if kind == "net" else output.loss
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    torch.testing.assert_close(loss_of(ours, inputs), loss, **EXACT)
    found = gradients(ours, loss_of(ours, inputs))
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], **EXACT, msg=name)
    still = {name for name, grad in found.items() if not grad.abs().max() > 1e-9}
    assert all(
        "k" in name.split(".")[-2] and name.endswith("shift") for name in still
    )  # softmax misses k's shift
    before, said = picture(ours), answer(ours, inputs)
    torch.testing.assert_close(answer(merge(ours), inputs), said, **EXACT)
    weights = dict(ours.named_parameters())
    for name, value in made.items():
        torch.testing.assert_close(weights[name], value, **EXACT, msg=name)
    assert differences(before, picture(unmerge(ours))) == []


def test_the_count_of_a_vit_is_the_published_one():
    """ViT-B/16: 205,824 and the head (Lian et al., table 1: 0.28 M with one of 100 classes)."""
    config = hf.ViTConfig(num_labels=100)
    with torch.device("meta"):
        model = hf.ViTForImageClassification(config)
    method, head = SSF(modules_to_save=("classifier",)), 100 * 769
    assert method.count(model) == 205_824 + head
    assert round(method.count(model) / 1e6, 2) == 0.28
    assert sum(trainable(method.attach(model)).values()) == 205_824 + head


@pytest.mark.parametrize("groups", [1, 2])
def test_the_channels_of_a_convolution_are_scaled_in_a_batch_or_alone(groups):
    layer, x = nn.Conv1d(4, 6, 3, groups=groups, dtype=F64), torch.randn(2, 4, 8, dtype=F64)
    model = nn.Sequential(layer).eval()
    plain = model(x)
    moved(SSF().attach(model))
    expected = plain * layer.ssf_scale[:, None] + layer.ssf_shift[:, None]
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x[1]), expected[1])
    torch.testing.assert_close(merge(model)(x), expected)


def test_without_a_bias_there_is_no_shift_and_a_norm_of_another_formula_is_left_out():
    model = nn.ModuleDict({"up": nn.Linear(4, 6, bias=False), "norm": nn.LayerNorm(6, bias=False)})
    model["gemma"], model["table"] = GemmaRMSNorm(6), nn.Embedding(5, 6)
    model["channels"], model["odd"] = nn.GroupNorm(1, 3), nn.GroupNorm(2, 4)
    assert trainable(SSF().attach(model)) == {"up.ssf_scale": 6, "norm.ssf_scale": 6}


@pytest.mark.parametrize("first", [SSF(), Adapter(bottleneck=3, target_modules=("output.LayerNorm",))])
def test_a_norm_that_something_else_has_changed_is_scaled_like_any(first):
    """What comes after scales what the changed norm gives: it is asked what the norm computes, not what they do."""
    expected = trainable(SSF().attach(fresh("bert"), name="ssf"))
    model = SSF().attach(moved(first.attach(fresh("bert"), name="first")), name="ssf")
    assert trainable(switch(model, "ssf")) == expected
    SSF(target_modules=("output.LayerNorm",)).attach(model, name="named")


@pytest.mark.parametrize("layer", [nn.LayerNorm(6), nn.Conv1d(6, 6, 1), nn.Linear(6, 6)])
def test_a_layer_whose_forward_was_replaced_is_not_scaled_in_vain(layer):
    model = nn.Sequential(layer, nn.Linear(6, 6))
    layer.forward = layer.forward  # as a library does it that moves inputs to another device
    assert set(trainable(SSF().attach(model, name="all"))) == {"1.ssf_scale@all", "1.ssf_shift@all"}
    with pytest.raises(ValueError, match=r"its forward was replaced on the object"):
        SSF(target_modules=("0",)).attach(model)


def test_torchs_encoder_layer_which_reads_past_it_in_evaluation_is_refused():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3))
    before = picture(model)
    with pytest.raises(ValueError, match=r"target_modules: '0\.linear1' .*set_fastpath_enabled\(False\)"):
        SSF().attach(model)
    assert differences(before, picture(model)) == []


def test_a_convolution_that_a_cache_replaces_is_left_alone():
    """RecurrentGemma reads its weight without a call as soon as a text goes on."""
    tokens = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 16, "lru_width": 16, "num_attention_heads": 2, "intermediate_size": 24}
    config = hf.RecurrentGemmaConfig(
        **tokens, **sizes, num_hidden_layers=2, block_types=["recurrent", "attention"]
    )
    model = made(hf.RecurrentGemmaForCausalLM, config)
    with pytest.raises(
        ValueError, match="can't be adapted: a text that goes on from a cache reads its weight"
    ):
        SSF(target_modules=("conv_1d",)).attach(model)
    moved(SSF().attach(model))
    ids = torch.tensor([[5, 6, 7, 8]])
    how = {"do_sample": False, "max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    said = [torch.stack(model.generate(ids, use_cache=use, **how).logits) for use in (True, False)]
    torch.testing.assert_close(*said, rtol=1e-4, atol=1e-5)


def test_a_quantised_layer_is_scaled_around_and_not_merged():
    layer = Quantised(nn.Linear(6, 5))
    model, x = moved(SSF(target_modules=("0",)).attach(nn.Sequential(layer))), torch.randn(3, 6)
    expected = model[0].ssf_scale * F.linear(x, layer.dense_weight(), layer.bias) + model[0].ssf_shift
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match="quantised"):
        merge(model)


def test_the_authors_start_is_near_the_base_and_fixed_by_a_seed():
    one, same, other = (tensors(SSF(init_std=0.02, init_seed=i).attach(fresh("bert"))) for i in (1, 1, 2))
    assert differences(one, same) == []
    assert differences(one, other)
    for key, mean in (("ssf_scale", 1.0), ("ssf_shift", 0.0)):
        drawn = torch.cat([t for name, t in one.items() if name.endswith(key)])
        assert drawn.mean().item() == pytest.approx(mean, abs=0.003)
        assert drawn.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit"])
def test_what_a_step_keeps_for_it_is_estimated(kind):
    model = model_for_memory(kind)
    options = {"batch_size": 2, "sequence_length": 24, "attention": "eager", "device": "cpu"}
    estimated = memory.estimate(model, SSF(), **options)
    SSF().attach(model)
    assert estimated.trained == sum(trainable(model).values()) == SSF().count(model)
    measured = held(model, batch_for_memory(kind, 2, 24))
    assert sum(estimated.activations.values()) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"target_modules": ("wrong",)}, "target_modules: this model has no 'wrong'"),
        ({"target_modules": ("embed_tokens",)}, "it is an Embedding, whose rows are words"),
        ({"target_modules": ("mlp",)}, "it is a LlamaMLP, not"),
        ({"target_modules": ("k_proj",), "modules_to_save": ("k_proj",)}, "is a target and part of"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(fields, says):
    model = tiny_model("llama")
    before = picture(model)
    with pytest.raises(ValueError, match=says):
        SSF(**fields).attach(model)
    assert differences(before, picture(model)) == []
    with pytest.raises(ValueError, match="init_std is -1; it must be a number ≥ 0"):
        SSF(init_std=-1)
