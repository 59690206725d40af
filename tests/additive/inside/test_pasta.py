"""PASTA: vectors for special tokens, wherever a model's tokens go in, however far a text has come."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F

from pefttutor import PASTA, fit, load, save, trainable
from pefttutor.train.losses import causal_lm_loss
from tests.cases import answer, gradients, moved
from tests.pictures import differences, picture
from tests.tiny import language_examples, llama_classifier, made, tiny_batch, tiny_model


def test_pasta_starts_as_the_base_and_changes_special_tokens_only(tiny, batch, tmp_path):
    inputs = batch("bert")
    inputs["input_ids"][:, 0], inputs["input_ids"][0, 5] = 1, 2
    method = PASTA(special_token_ids=(1, 2), num_special=2)
    model = method.attach(tiny("bert"))
    assert torch.equal(model(**inputs).logits, tiny("bert")(**inputs).logits)
    assert sum(trainable(model).values()) == method.count(tiny("bert")) == 2 * 24 * 2
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(generator=torch.Generator().manual_seed(1))
    seen = {}

    def note(key):
        def hook(module, args, kwargs):
            seen[key] = args[0] if args else kwargs["hidden_states"]

        return hook

    expected = tiny("bert")
    for key, one in (("ours", model), ("base", expected)):
        one.bert.encoder.layer[0].attention.register_forward_pre_hook(note(key), with_kwargs=True)
        one(**inputs)
    change = (seen["ours"] - seen["base"]).abs().sum(-1) > 1e-6
    assert change.sum() == 4  # three first tokens and one end
    vectors = model.bert.encoder.layer[0].special
    torch.testing.assert_close(seen["ours"][0, 5] - seen["base"][0, 5], vectors[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen["ours"][2, 0] - seen["base"][2, 0], vectors[0], rtol=1e-5, atol=1e-6)
    save(model, tmp_path)
    assert torch.equal(load(tiny("bert"), tmp_path)(**inputs).logits, model(**inputs).logits)


# ---- the loss, the body and the model see the same


def texts(kind: str, second: bool = False) -> dict[str, torch.Tensor]:
    """A batch with special tokens at other places than the other one's."""
    batch = tiny_batch(kind)
    places = [(0, 0), (0, 4), (1, 2), (2, 1)] if second else [(0, 3), (1, 0), (1, 5), (2, 0), (2, 3)]
    for row, place in places:
        batch["input_ids"][row, place] = 1 + (row + place) % 2
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def adapted(kind: str, **more: object) -> nn.Module:
    return moved(PASTA(special_token_ids=(1, 2), **more).attach(tiny_model(kind)))


def by_the_model(model, batch):
    return model(**batch).loss


def by_the_body(model, batch):
    """As a loss of one's own does it: the body alone, then the head."""
    hidden = model.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden)[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_every_loss_is_of_this_batch_and_not_of_the_one_before(kind, order):
    """A fresh model has seen no batch yet: each loss is asked first once."""
    batches, fresh = (texts(kind), texts(kind, second=True)), adapted(kind)
    expected = [by_the_model(copy.deepcopy(fresh), batch).item() for batch in batches]
    assert abs(expected[0] - expected[1]) > 1e-3
    for loss in (causal_lm_loss, by_the_body, by_the_model):
        model = copy.deepcopy(fresh)
        for i in order:
            value = loss(model, batches[i])
            assert value.item() == pytest.approx(expected[i], rel=1e-5)
            found = gradients(model, value)
            assert set(found) == set(trainable(model))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_loss_has_the_models_own_gradients(kind):
    model, other = adapted(kind), texts(kind, second=True)
    batch = texts(kind)
    expected = gradients(model, by_the_model(model, batch))
    for loss in (causal_lm_loss, by_the_body):
        loss(model, other)
        torch.testing.assert_close(gradients(model, loss(model, batch)), expected, rtol=1e-4, atol=1e-6)


def test_fit_takes_the_same_steps_with_either_loss():
    examples = language_examples(8)
    for example in examples:
        example["input_ids"] = (example["input_ids"] % 97).clamp(min=1)
        example["labels"] = example["input_ids"].clone()
    runs = []
    for loss in (None, causal_lm_loss):
        model = adapted("llama")
        runs.append(fit(model, examples, steps=4, batch_size=2, lr=0.05, loss=loss).loss)
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


# ---- caches


def cache_of(output) -> dict[str, object]:
    """The cache that a call has filled, by the name that this transformers has for it."""
    key = "cache" if "cache" in output.keys() else "past_key_values"  # noqa: SIM118 (`in` knows old names too)
    return {key: output[key]}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("cut", [1, 3, 4, 8])
def test_a_text_in_two_parts_with_a_cache_is_the_text_in_one(kind, cut):
    """The special tokens of the first part count in the second."""
    model, ids = (
        adapted(kind, num_special=3),
        torch.tensor([[1, 7, 8, 2, 9, 1, 30, 4, 5], [9, 8, 2, 1, 5, 6, 7, 1, 3]]),
    )
    with torch.no_grad():
        expected = model(ids).logits
        first = model(ids[:, :cut], use_cache=True)
        second = model(ids[:, cut:], **cache_of(first)).logits
    torch.testing.assert_close(torch.cat([first.logits, second], 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampled"]
)
def test_generating_with_a_cache_says_the_same_as_without(how):
    model, said = adapted("llama", num_special=4), []
    batch = {key: value[:, :6] for key, value in texts("llama").items() if key != "labels"}
    prompt = {key: value[:2] for key, value in batch.items()}
    prompt["attention_mask"] = torch.ones_like(prompt["attention_mask"])
    for use_cache in (True, False):
        torch.manual_seed(0)
        said.append(model.generate(**prompt, use_cache=use_cache, max_new_tokens=6, min_new_tokens=6, **how))
    assert torch.equal(*said)


def test_a_cache_that_was_filled_without_the_vectors_is_refused():
    model, plain, ids = adapted("llama"), tiny_model("llama"), torch.tensor([[1, 7, 8, 2]])
    with torch.no_grad():
        cache = cache_of(plain(ids, use_cache=True))
    with pytest.raises(
        ValueError, match="this cache was filled without it: compute the text's beginning with the adap"
    ):
        model(ids, **cache)


# ---- which tokens


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_not_special_even_if_its_id_is(side):
    """As where the padding token is the end token."""
    model = moved(PASTA(special_token_ids=(0, 1)).attach(tiny_model("llama")))
    ids = torch.tensor([7, 0, 9, 1, 5])  # two special tokens inside
    pad = torch.zeros(3, dtype=torch.long)
    padded = torch.cat([ids, pad] if side == "right" else [pad, ids])[None]
    mask = torch.cat(
        [torch.ones(5), torch.zeros(3)] if side == "right" else [torch.zeros(3), torch.ones(5)]
    ).long()[None]
    with torch.no_grad():
        alone = model(ids[None]).logits
        found = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        without_a_mask = model(padded).logits
    torch.testing.assert_close(found[mask.bool()], alone[0], rtol=1e-4, atol=1e-5)
    if side == "left":
        assert not torch.allclose(without_a_mask[mask.bool()], alone[0], atol=1e-2)


def test_only_the_first_so_many_of_a_text_have_a_vector():
    model = adapted("bert", num_special=2)
    batch = {"input_ids": torch.tensor([[1, 7, 2, 8, 1, 2]])}
    seen = []
    block = model.bert.encoder.layer[0]
    plain = tiny_model("bert")
    for one in (model, plain):
        one.bert.encoder.layer[0].attention.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        answer(one, batch)
    change = seen[0] - seen[1]
    torch.testing.assert_close(change[0, [0, 2]], block.special.detach(), rtol=1e-5, atol=1e-6)
    assert not change[0, [1, 3, 4, 5]].any()


# ---- models


@pytest.mark.parametrize("kind", [hf.AlbertModel, hf.ElectraModel])
def test_where_embeddings_are_narrower_than_the_blocks_the_vectors_are_as_wide_as_the_blocks(kind, tmp_path):
    sizes = {
        "vocab_size": 50,
        "embedding_size": 6,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
    }
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 16}
    sizes |= {"num_hidden_groups": 2} if kind is hf.AlbertModel else {}

    def base():
        return made(kind, kind.config_class(**sizes))

    method, ids = PASTA(special_token_ids=(1, 2)), torch.tensor([[1, 7, 8, 2], [1, 5, 2, 9]])
    model = method.attach(base())
    assert sum(trainable(model).values()) == method.count(base()) == 2 * 8 * 2
    assert torch.equal(model(ids).last_hidden_state, base()(ids).last_hidden_state)
    moved(model)(ids).last_hidden_state.sum().backward()
    changed = model(ids).last_hidden_state
    assert (changed - base()(ids).last_hidden_state).abs().max() > 1e-3
    save(model, tmp_path)
    assert torch.equal(load(base(), tmp_path)(ids).last_hidden_state, changed)


REFUSED = {
    "T5": (lambda: tiny_model("t5"), "PASTA reads one text, and a T5ForConditionalGeneration has two"),
    "ViT": (lambda: tiny_model("vit"), "PASTA adds to special tokens, and a ViTForImageClassification has none"),
    "a network of one's own": (lambda: tiny_model("net"), "PASTA adds to special tokens, and a Net has none"),
    "speech": (
        lambda: made(hf.WhisperForAudioClassification, hf.WhisperConfig(
            d_model=8, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=8, decoder_ffn_dim=8, num_mel_bins=4, vocab_size=20, max_source_positions=6,
            classifier_proj_size=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )),
        "PASTA adds to special tokens, and a WhisperForAudioClassification has none: it reads input_features",
    ),
}  # fmt: skip


@pytest.mark.parametrize("make", REFUSED)
def test_a_model_that_does_not_read_one_text_is_refused_by_its_name(make):
    make, says = REFUSED[make]
    model = make()
    before = picture(model)
    for act in (PASTA(special_token_ids=(1,)).attach, PASTA(special_token_ids=(1,)).count):
        with pytest.raises(ValueError, match=says):
            act(model)
    assert differences(before, picture(model)) == []


@pytest.mark.parametrize("ids", [5, "[CLS]", (1.5,)])
def test_special_tokens_are_whole_numbers(ids):
    with pytest.raises(ValueError, match="special_token_ids is"):
        PASTA(special_token_ids=ids)


def test_embeddings_as_input_hide_the_special_tokens():
    model = PASTA(special_token_ids=(1,)).attach(llama_classifier())
    with pytest.raises(ValueError, match="input_ids; give these, not inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 3, 16))
    with pytest.raises(ValueError, match="give these"):
        model(input_ids=None, inputs_embeds=torch.zeros(1, 3, 16))


def test_a_block_alone_does_not_know_its_tokens():
    model = adapted("gpt2")
    answer(model, texts("gpt2"))
    with pytest.raises(
        ValueError, match=r"PASTA's block got hidden states \(1, 2, 24\) and doesn't know their tokens"
    ):
        model.transformer.h[0](torch.zeros(1, 2, 24))


def test_a_copy_counts_for_itself():
    model = adapted("llama")
    twin, first, second = copy.deepcopy(model), texts("llama"), texts("llama", second=True)
    expected = answer(model, first), answer(model, second)
    for one, batch, logits in (
        (twin, second, expected[1]),
        (model, first, expected[0]),
        (twin, first, expected[0]),
    ):
        assert torch.equal(answer(one, batch), logits)
