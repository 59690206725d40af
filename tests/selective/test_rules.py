"""Methods that choose by rule: which tensors and entries, how many, and what each rule promises."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from pefttutor import (
    BitFit,
    LastLayers,
    LayerNormTuning,
    LinearProbe,
    PaFi,
    adapted,
    fit,
    load,
    save,
    trainable,
)
from pefttutor.parts.blocks import blocks
from pefttutor.parts.cached_prefix import CachedPrefix
from tests.tiny import class_examples, language_examples, llama, llama_classifier, weights

RULES = [
    BitFit(),
    BitFit(target_modules=("q_proj", "down_proj")),
    LastLayers(),
    LayerNormTuning(),
    PaFi(fraction=0.02),
    LinearProbe(modules_to_save=("score",)),
]


@pytest.mark.parametrize("method", RULES, ids=str)
def test_only_what_trains_changes_and_comes_back_from_a_file(method, tmp_path):
    model = llama_classifier()
    before = weights(model)
    method.attach(model)
    ids = torch.tensor([[1, 7, 8, 9]])
    assert torch.equal(model(input_ids=ids).logits, llama_classifier()(input_ids=ids).logits)
    fit(model, class_examples(), steps=4, lr=0.05, weight_decay=0.5)
    after, trains = weights(model), trainable(model)
    for name in before:
        if name in trains:
            assert not torch.equal(after[name], before[name])
        elif f"{name}_values" in trains:
            moved = (after[name] != before[name]).flatten()
            index = dict(model.named_buffers())[f"{name}_index"].long()
            assert moved.sum() <= len(index)
            assert not moved[torch.ones_like(moved).index_fill(0, index, False)].any()
        else:
            assert torch.equal(after[name], before[name])
    save(model, tmp_path)
    again = load(llama_classifier(), tmp_path)
    assert adapted(again) == method or vars(adapted(again)).keys() == vars(method).keys()
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


# ---- BitFit


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


def test_bitfit_on_a_model_without_biases_says_what_to_do():
    model = llama(attention_bias=False, mlp_bias=False)
    with pytest.raises(ValueError, match=r"no bias .*LayerNormTuning"):
        BitFit().attach(model)
    with pytest.raises(ValueError, match=r"none of model\.norm has a bias"):
        BitFit(target_modules=("model.norm",)).attach(llama())
    assert all(p.requires_grad for p in model.parameters())


# ---- last layers


def test_the_last_quarter_is_rounded_up(kind, tiny):
    model = tiny(kind)
    name, stack = blocks(model)
    LastLayers(fraction=0.3).attach(model)
    inside = {n for n, _ in model.named_parameters() if n.startswith(f"{name}.{len(stack) - 1}.")}
    assert set(trainable(model)) == inside
    assert LastLayers(fraction=0.3).count(tiny(kind)) == sum(trainable(model).values())


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="no list of blocks"):
        LastLayers().attach(nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_kept_features_give_identical_losses_and_gradients(kind, tiny, batch):
    def run(cached):
        model, inputs = tiny(kind, num_hidden_layers=4), batch(kind)
        LastLayers(fraction=0.25).attach(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        if cached:
            prefix = CachedPrefix(model)
            kept = prefix.compute(inputs)
            assert prefix.depth == 3
        losses = []
        for _ in range(3):
            if cached:
                with prefix.skipped(kept):
                    loss = model(**inputs).loss
            else:
                loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, weights(model)

    (a, one), (b, two) = run(False), run(True)
    assert a == b
    assert len(set(a)) == 3
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_prefix_that_trains_cannot_be_kept(tiny):
    with pytest.raises(ValueError, match="no block can be skipped"):
        CachedPrefix(tiny("bert"))


# ---- norms and the probe


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


def test_methods_without_anything_to_train_say_so():
    with pytest.raises(ValueError, match="no LayerNorm or RMSNorm among Linear"):
        LayerNormTuning().attach(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nothing would train"):
        LinearProbe(modules_to_save=()).attach(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="modules_to_save"):
        LinearProbe().attach(llama())


# ---- PaFi


def test_pafi_chooses_what_kthvalue_says():
    model = llama(tie_word_embeddings=False)
    chosen = PaFi(fraction=0.03).masks(model)
    assert not any("embed" in name for name in chosen)
    named = dict(model.named_parameters())
    flat = torch.cat([named[name].abs().flatten() for name in chosen])
    mask = torch.cat([m.flatten() for m in chosen.values()])
    k = int(0.03 * len(flat))
    assert int(mask.sum()) == k
    limit = flat.kthvalue(k).values
    assert flat[mask].max() <= limit <= flat[~mask].min()


def test_pafi_asks_for_no_data_and_is_the_same_for_every_task():
    one, two = llama(), llama()
    PaFi(fraction=0.02).attach(one)
    fit(one, language_examples(), steps=2, lr=0.05)
    again = PaFi(fraction=0.02).attach(two)
    for (n, a), (_, b) in zip(one.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(a, b), n


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5, "half", True, float("nan")])
@pytest.mark.parametrize("cls", [PaFi, LastLayers])
def test_a_fraction_outside_is_refused(cls, fraction):
    with pytest.raises(ValueError, match=r"fraction is .*\(0, 1\]"):
        cls(fraction=fraction)
