"""Prefix tuning: keys and values before a text's, held against HF PEFT's, and against words that were really read."""

from __future__ import annotations

import copy
import inspect

import peft
import pytest
import torch
import transformers as hf
from torch import nn

import pefttutor as pt
from pefttutor import PrefixTuning
from pefttutor.train.losses import causal_lm_loss
from tests.cases import answer, gradients, moved
from tests.pictures import differences, picture, tensors
from tests.tiny import checkpointed, made, tiny_batch, tiny_config, tiny_model

P, WIDTH, HIDDEN = 5, 24, 7
BODIES = {"llama": "model", "gpt2": "transformer", "t5": "decoder", "bert": "bert"}


# HF PEFT 0.21 gives a model its cache by the name of before.
by_hf_peft = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")


def adapted(kind: str, **settings: object) -> nn.Module:
    settings = {"num_virtual_tokens": P, "encoder_hidden_size": HIDDEN} | settings
    return moved(PrefixTuning(**settings).attach(tiny_model(kind)))


def peers(kind: str, projection: bool) -> tuple[nn.Module, nn.Module, dict[str, str]]:
    """Ours and HF PEFT's model with the same prefix, and our names of what makes it; the base gets gradients too.

    HF PEFT's table is as wide as keys and values, and so the model's must be where there is one.
    """
    heads = {"num_key_value_heads": 4} if projection and kind == "llama" else {}
    settings = {"num_virtual_tokens": P, "prefix_projection": projection, "encoder_hidden_size": HIDDEN}
    ours = moved(PrefixTuning(**settings).attach(tiny_model(kind, **heads)))
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", **settings)
    theirs = peft.get_peft_model(tiny_model(kind, **heads), config).eval()
    keys = {"embedding.weight": "prefix"}
    if projection:
        keys = {"embedding.weight": "prefix_table"}
        keys |= {f"transform.{i}.{x}": f"prefix_{i}_{x}" for i in (0, 2) for x in ("weight", "bias")}
    names = {f"prompt_encoder.default.{theirs}": f"{BODIES[kind]}.{key}" for theirs, key in keys.items()}
    for name, own in names.items():
        theirs.get_parameter(name).data.copy_(ours.get_parameter(own).data)
    for p in (*ours.parameters(), *theirs.base_model.parameters()):
        p.requires_grad_(True)
    return ours, theirs, names


def by_our_names(found: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    return {names.get(name, name.removeprefix("base_model.")): g for name, g in found.items()}


@by_hf_peft
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_outputs_and_every_gradient_are_those_of_hf_peft(kind, projection):
    """On a batch that is padded on the right; without an MLP, Llama's four heads share the keys of two."""
    (ours, theirs, names), batch = peers(kind, projection), tiny_batch(kind)
    mine, other = ours(**batch), theirs(**batch)
    torch.testing.assert_close(mine.logits, other.logits)
    torch.testing.assert_close(mine.loss, other.loss)
    expected = by_our_names(gradients(theirs, other.loss), names)
    found = gradients(ours, mine.loss)
    assert set(found) == set(expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@by_hf_peft
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_text_is_the_text_alone_on_either_side(kind, side):
    """HF PEFT is asked row by row; it takes no positions, so that padding on the left would count as words there."""
    (ours, theirs, names), batch = peers(kind, False), tiny_batch("llama", side=side)
    real = batch["attention_mask"].bool()
    said = ours(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[real]
    rows = [
        theirs(input_ids=ids[mask][None]).logits[0]
        for ids, mask in zip(batch["input_ids"], real, strict=True)
    ]
    expected = torch.cat(rows)
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-5)
    weights = torch.linspace(-1, 1, said.numel()).view_as(said)
    torch.testing.assert_close(
        gradients(ours, (said * weights).sum()),
        by_our_names(gradients(theirs, (expected * weights).sum()), names),
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_the_model_goes_on_from_a_cache_that_holds_the_prefix(kind):
    """HF PEFT can't be asked: it lengthens T5's encoder mask as well, where no word stands, and refuses BERT."""
    ours, base, batch = adapted(kind), tiny_model(kind), tiny_batch(kind)
    prefix = ours.get_submodule(BODIES[kind]).prefix.detach().clone().requires_grad_()
    rows = prefix.view(P, 2, 2, 4, -1).permute(1, 2, 3, 0, 4).unsqueeze(2).expand(-1, -1, 3, -1, -1, -1)
    cache = hf.DynamicCache([tuple(layer) for layer in rows])
    cache = hf.EncoderDecoderCache(cache, hf.DynamicCache()) if kind == "t5" else cache

    def go_on(body, args, kwargs):
        key = next(k for k in ("cache", "past_key_values") if k in inspect.signature(body.forward).parameters)
        if kind == "bert":
            kwargs["attention_mask"] = torch.cat([torch.ones(3, P).long(), kwargs["attention_mask"]], 1)
        return args, kwargs | {key: cache}

    base.get_submodule(BODIES[kind]).register_forward_pre_hook(go_on, with_kwargs=True)
    found, expected = ours(**batch), base(**batch)
    torch.testing.assert_close(found.logits, expected.logits)
    (gradient,) = torch.autograd.grad(expected.loss, [prefix])
    (own,) = gradients(ours, found.loss).values()
    torch.testing.assert_close(own, gradient)


# ---- words as a prefix


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "bloom"])
def test_the_keys_and_values_of_words_are_these_words(kind):
    """So positions, rotations and masks are those of a text that goes on: no library is asked, but the model itself."""
    ids = tiny_batch("llama")["input_ids"][:1]
    model = PrefixTuning(num_virtual_tokens=4).attach(tiny_model(kind), ids[0, :4])
    expected = answer(tiny_model(kind), {"input_ids": ids})[:, 4:]
    torch.testing.assert_close(answer(model, {"input_ids": ids[:, 4:]}), expected, rtol=1e-4, atol=1e-5)
    padded = torch.cat([torch.zeros(1, 3).long(), ids[:, 4:]], 1)
    found = answer(model, {"input_ids": padded, "attention_mask": (padded != 0).long()})
    torch.testing.assert_close(found[:, 3:], expected, rtol=1e-4, atol=1e-5)


def test_a_prefix_of_zeros_takes_its_share_of_the_attention():
    model, batch = adapted("llama"), tiny_batch("llama")
    model.model.prefix.data.zero_()
    assert (answer(model, batch) - answer(tiny_model("llama"), batch)).abs().max() > 0.01


def test_a_head_gives_the_prefix_its_share_and_the_rest_to_the_text():
    """softmax over both is (1 − λ) that over the text, and λ that over the prefix: He et al. 2021, eq. 7."""
    config = tiny_config("gpt2", layers=1)
    config._attn_implementation = "eager"
    base, ids = made(hf.GPT2LMHeadModel, config, spread=True), torch.tensor([[3, 7, 8, 4]])
    model = moved(PrefixTuning(num_virtual_tokens=P).attach(base))
    seen = model(ids, output_attentions=True).attentions[0]
    assert seen.shape == (1, 4, 4, P + 4)
    share = seen[..., :P].sum(-1, keepdim=True)
    shifted = torch.arange(4)[None] + P
    pt.switch(model)
    alone = model(ids, position_ids=shifted, output_attentions=True).attentions[0]
    torch.testing.assert_close(seen[..., P:], (1 - share) * alone, rtol=1e-4, atol=1e-5)


# ---- caches


def cache_of(output) -> dict[str, object]:
    """The cache that a call has filled, by the name that this transformers has for it."""
    key = "cache" if "cache" in output.keys() else "past_key_values"  # noqa: SIM118 (`in` knows old names too)
    return {key: output[key]}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_cache_holds_the_text_alone_and_a_text_in_two_parts_is_the_text_in_one(kind):
    model, ids = adapted(kind), tiny_batch(kind)["input_ids"][:1]
    with torch.no_grad():
        expected = model(ids).logits
        first = model(ids[:, :4], use_cache=True)
        (cache,) = cache_of(first).values()
        assert cache.get_seq_length() == 4
        assert model.base_model(ids[:, :4], use_cache=True, return_dict=False)[1].get_seq_length() == 4
        assert all("Prefixed" not in type(layer).__name__ for layer in cache.layers)
        second = model(ids[:, 4:], **cache_of(first)).logits
        (plain,) = cache_of(tiny_model(kind)(ids, use_cache=True)).values()
        with pytest.raises(ValueError, match=r"filled without the prefix: compute the text's beginning"):
            model(ids, **dict.fromkeys(cache_of(first), plain))
    torch.testing.assert_close(torch.cat([first.logits, second], 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True}], ids=["beams", "sampled"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generating_with_a_cache_says_the_same_as_without_and_training_goes_on(kind, how):
    model, said, batch = adapted(kind, prefix_projection=True), [], tiny_batch(kind, side="left")
    before = gradients(model, model(**batch).loss)
    for use_cache in (True, False):
        torch.manual_seed(0)
        prompt = {key: batch[key] for key in ("input_ids", "attention_mask")}
        said.append(model.generate(**prompt, use_cache=use_cache, max_new_tokens=5, min_new_tokens=5, **how))
    assert torch.equal(*said)
    torch.testing.assert_close(gradients(model, model(**batch).loss), before)


def test_a_mask_that_is_not_a_value_a_token_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask, which is Tensor \(3, 1, 9, 9\); expected"):
        adapted("llama")(tiny_batch("llama")["input_ids"], attention_mask=torch.ones(3, 1, 9, 9))


# ---- several, switched, and in a checkpointed model


def test_two_prefixes_stand_side_by_side_and_each_can_be_switched_off():
    model, batch = tiny_model("gpt2"), tiny_batch("gpt2")
    for seed, name in enumerate(("german", "bank")):
        PrefixTuning(num_virtual_tokens=2 + seed, init_seed=seed).attach(model, name=name)
    rows = {name: model.transformer.get_parameter(f"prefix@{name}").detach() for name in ("german", "bank")}
    for active in (("german", "bank"), ("bank",)):
        pt.switch(model, *active)
        one = PrefixTuning(num_virtual_tokens=sum(len(rows[name]) for name in active)).attach(
            tiny_model("gpt2")
        )
        one.transformer.prefix.data.copy_(torch.cat([rows[name] for name in active[::-1]]))
        torch.testing.assert_close(answer(model, batch), answer(one, batch))
        expected = gradients(model, model(**batch).loss)
        twin = checkpointed(copy.deepcopy(model), reentrant=True).train()
        torch.testing.assert_close(gradients(twin, twin(**batch).loss), expected)
    said = [model.generate(batch["input_ids"][:1], use_cache=use, max_new_tokens=4) for use in (True, False)]
    assert torch.equal(*said)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_checkpointing_changes_no_gradient_of_either_form(kind, reentrant):
    for projection in (False, True):
        model = adapted(kind, prefix_projection=projection).train()
        expected = gradients(model, model(**tiny_batch(kind)).loss)
        checkpointed(model, reentrant=reentrant)
        found = gradients(model, model(**tiny_batch(kind)).loss)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_mlp_runs_once_a_step():
    model, calls = adapted("llama", prefix_projection=True), []
    stream = next(
        hook.__self__ for hook in model.model._forward_pre_hooks.values() if hasattr(hook, "__self__")
    )
    make = stream.maker.make
    stream.maker.make = lambda module: calls.append(1) or make(module)
    causal_lm_loss(model, tiny_batch("llama"))
    calls.clear()
    model(**tiny_batch("llama")).loss.backward()
    assert len(calls) == 1


# ---- counts, and dropping the MLP


@pytest.mark.parametrize(("kind", "wide"), [("llama", 2 * 6), ("gpt2", 24), ("t5", 4 * 5)])
def test_the_counts_are_the_closed_ones(kind, wide):
    """2 · L · n · d_h a virtual token; Llama's keys are those of 2 heads, not of 4."""
    flat, both = PrefixTuning(num_virtual_tokens=P), 2 * 2 * wide
    projected = PrefixTuning(num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=HIDDEN)
    for method, expected in (
        (flat, P * both),
        (projected, P * 24 + (24 * HIDDEN + HIDDEN) + (HIDDEN + 1) * both),
    ):
        assert method.count(tiny_model(kind)) == expected
        assert method.count(tiny_model(kind).to("meta")) == expected
        assert sum(pt.trainable(method.attach(tiny_model(kind))).values()) == expected


def test_the_published_count():
    """Li & Liang 2021: 250 K for GPT-2 medium; with 5 virtual tokens it is 2 · 5 · 24 · 1024."""
    with torch.device("meta"):
        model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    assert PrefixTuning(num_virtual_tokens=5).count(model) == 245_760


def test_the_mlp_is_dropped_and_the_model_says_what_it_said(tmp_path):
    model, batch = (
        adapted("bert", prefix_projection=True, modules_to_save=("classifier",)),
        tiny_batch("bert"),
    )
    expected = answer(model, batch)
    method = pt.adapted(model)
    method.drop_projection(model)
    assert torch.equal(answer(model, batch), expected)
    assert pt.trainable(model) == {
        "bert.prefix": P * 2 * 2 * 24,
        "classifier.weight": 72,
        "classifier.bias": 3,
    }
    assert pt.adapted(model).prefix_projection is False
    pt.save(model, tmp_path)
    assert torch.equal(answer(pt.load(tiny_model("bert"), tmp_path), batch), expected)
    with pytest.raises(ValueError, match="has no network to drop"):
        method.drop_projection(model)
    pt.detach(model)
    assert differences(tensors(tiny_model("bert")), tensors(model)) == []


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_prefix_that_starts_as_a_soft_prompt_says_what_that_says(kind):
    """On a padded batch, in its logits and while it goes on from a cache: the virtual tokens are read once for all."""
    batch = tiny_batch(kind)
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    prompted = pt.PromptTuning(num_virtual_tokens=P).attach(tiny_model(kind))
    prompt = next(p for p in prompted.parameters() if p.requires_grad)
    prompt.data.normal_(0, 2, generator=torch.Generator().manual_seed(1))
    model = PrefixTuning(num_virtual_tokens=P).attach(tiny_model(kind), prompt)
    real, plain = batch["attention_mask"].bool(), tiny_model(kind)(**batch).logits
    said, expected = model(**batch).logits, prompted(**batch).logits
    torch.testing.assert_close(said[real], expected[real], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain[real], expected[real], rtol=1e-2)
    words = [m.generate(batch["input_ids"][:1], max_new_tokens=5, do_sample=False) for m in (model, prompted)]
    assert torch.equal(*words)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_a_start_is_computed_after_the_prefix_that_the_model_has(kind):
    """Words that are read behind another prefix, and the keys and values that start as theirs, say the same.

    Bloom isn't asked: it goes by a key's place, and a later prefix stands before an earlier one.
    """
    ids = tiny_batch("llama")["input_ids"]
    one, other = (moved(PrefixTuning(num_virtual_tokens=3).attach(tiny_model(kind))) for _ in range(2))
    model = PrefixTuning(num_virtual_tokens=P).attach(one, [3, 8, 5, 9, 4], name="words")
    prompted = pt.PromptTuning(num_virtual_tokens=P).attach(other, [3, 8, 5, 9, 4], name="words")
    torch.testing.assert_close(model(ids).logits, prompted(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_start_is_refused_where_other_virtual_tokens_come_before_the_text():
    for method in (pt.PromptTuning(num_virtual_tokens=3), pt.PTuning(num_virtual_tokens=3)):
        model = method.attach(tiny_model("llama"), name="before")
        before = picture(model)
        with pytest.raises(ValueError, match=r"reads 3 virtual tokens before each text, .* switch them off"):
            PrefixTuning(num_virtual_tokens=P).attach(model, [3] * P)
        assert differences(before, picture(model)) == []
        pt.switch(model)
        PrefixTuning(num_virtual_tokens=P).attach(model, [3] * P)


# ---- refusals


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: made(hf.DistilBertModel, hf.DistilBertConfig(dim=8, n_layers=1, n_heads=2)),
         "a DistilBertModel takes no cache of these, so nothing can stand there. PromptTuning puts"),
        (lambda: made(hf.MambaForCausalLM, hf.MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2)),
         r"of the 2 layers of a MambaModel 0 give some to a cache"),
        (lambda: tiny_model("vit"), "before a text's tokens, and a ViTForImageClassification has none"),
    ],
)  # fmt: skip
def test_a_model_whose_attention_takes_no_prefix_is_refused(make, says):
    model = make()
    before = picture(model)
    for act in (PrefixTuning().attach, PrefixTuning().count):
        with pytest.raises(ValueError, match=says):
            act(model)
    assert differences(before, picture(model)) == []


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({}, [3]),
        ({}, [0.5] * P),
        ({}, torch.ones(P, 23)),
        ({"prefix_projection": True}, [3] * P),
        ({}, [[3] * P]),
        ({}, [97] * P),
        ({}, [-1] * P),
        ({}, [True] * P),
        ({}, torch.ones(P, 24) * 1j),
        ({}, [[0.5], [0.5, 1.0]]),
        ({}, []),
        ({}, "three"),
        ({}, [None] * P),
        ({}, {"input_ids": [3] * P}),
    ],
)
def test_a_start_that_does_not_fit_is_refused(settings, start):
    model = tiny_model("llama")
    before = picture(model)
    with pytest.raises(
        ValueError,
        match=r"(?s)start is .*; expected 5 token ids, as many as num_virtual_tokens, or their emb",
    ):
        PrefixTuning(num_virtual_tokens=P, **settings).attach(model, start)
    assert differences(before, picture(model)) == []
