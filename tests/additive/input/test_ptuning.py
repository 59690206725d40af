"""P-tuning: the prompt encoder against HF PEFT's, published counts, and dropping it after training."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers as hf
from torch import nn

import pefttutor as pt
from pefttutor import PTuning
from pefttutor.parts.cached_attention import cache_key
from tests.cases import answer, gradients, moved
from tests.pictures import differences, tensors
from tests.tiny import made, same, tiny_batch, tiny_model, weights

P, WIDTH, HIDDEN = 4, 24, 7
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
READERS = {"llama": "model", "gpt2": "transformer", "t5": "encoder"}


def adapted(kind: str, encoder: str = "lstm", **settings: object) -> nn.Module:
    method = PTuning(num_virtual_tokens=P, encoder=encoder, encoder_hidden_size=HIDDEN, **settings)
    return moved(method.attach(tiny_model(kind)))


def peers(kind: str, encoder: str) -> tuple[nn.Module, nn.Module, dict[str, str]]:
    """Ours, HF PEFT's with the same prompt encoder, and our names of its parameters."""
    ours = adapted(kind, encoder)
    config = peft.PromptEncoderConfig(
        task_type=TASKS[kind], num_virtual_tokens=P, token_dim=WIDTH, num_transformer_submodules=1, num_layers=2,
        num_attention_heads=4, encoder_reparameterization_type=encoder.upper(), encoder_hidden_size=HIDDEN,
    )  # fmt: skip
    theirs = peft.get_peft_model(tiny_model(kind), config).eval()
    names = {}
    for name, p in theirs.prompt_encoder.default.named_parameters():
        part, _, own = name.partition(".")
        key = {
            "embedding": "table",
            "lstm_head": f"lstm_{own}",
            "mlp_head": own if encoder == "mlp" else f"head_{own}",
        }
        names[f"prompt_encoder.default.{name}"] = f"{READERS[kind]}.ptuning_{key[part].replace('.', '_')}"
        p.data.copy_(ours.get_parameter(names[f"prompt_encoder.default.{name}"]).data)
    return ours, theirs, names


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_outputs_and_every_gradient_are_those_of_hf_peft(kind, encoder):
    (ours, theirs, names), batch = peers(kind, encoder), tiny_batch(kind)
    if kind != "t5":
        batch["labels"][:, 0] = -100  # HF PEFT lets the last virtual token predict the text's first
    mine, other = ours(**batch), theirs(**batch)
    torch.testing.assert_close(mine.logits, other.logits[:, -mine.logits.shape[1] :])
    torch.testing.assert_close(mine.loss, other.loss)
    expected = {names[name]: g for name, g in gradients(theirs, other.loss).items()}
    found = gradients(ours, mine.loss)
    assert set(found) == set(expected) == set(pt.trainable(ours))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("encoder", "hidden", "count"),
    [
        ("lstm", None, lambda d: 46 * d**2 + 35 * d),  # HF PEFT
        ("lstm", WIDTH // 2, lambda d: 14 * d**2 + 18 * d),  # the authors' code for LAMA
        ("mlp", None, lambda d: 3 * (d**2 + d)),
        ("none", None, lambda d: 0),
    ],
)
def test_the_counts_are_the_closed_ones(encoder, hidden, count):
    method, model = (
        PTuning(num_virtual_tokens=P, encoder=encoder, encoder_hidden_size=hidden),
        tiny_model("llama"),
    )
    expected = P * WIDTH + count(WIDTH)
    assert method.count(model) == expected
    assert sum(pt.trainable(method.attach(model)).values()) == expected


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_the_encoder_is_dropped_and_the_model_says_what_it_said(encoder, tmp_path):
    model, batch = tiny_model("gpt2"), tiny_batch("gpt2")
    pt.BitFit().attach(model, name="other")
    method = PTuning(num_virtual_tokens=P, encoder=encoder, encoder_dropout=0.5)
    moved(method.attach(model, name="german"))
    pt.switch(model, "german")
    expected = answer(model, batch)
    assert method.drop_encoder(model.train(), name="german") is model
    assert torch.equal(answer(model.eval(), batch), expected)
    assert pt.trainable(model) == {"transformer.ptuning@german": P * WIDTH}
    assert pt.adapted(model, "german") == PTuning(num_virtual_tokens=P, encoder="none", encoder_dropout=0.5)
    gradients(model, model(**batch).loss)
    pt.save(model, tmp_path, name="german")
    again = pt.load(tiny_model("gpt2"), tmp_path)
    assert torch.equal(answer(again, batch), expected)
    with pytest.raises(ValueError, match=r"'german' \(PTuning\) has no network to drop"):
        method.drop_encoder(model, name="german")
    pt.detach(model)
    assert differences(tensors(tiny_model("gpt2")), tensors(model)) == []


def test_a_head_that_trains_beside_it_stays_when_the_encoder_goes():
    model = adapted("bert", modules_to_save=("classifier",))
    head, expected = weights(model.classifier), answer(model, tiny_batch("bert"))
    pt.adapted(model).drop_encoder(model)
    assert same(weights(model.classifier), head)
    assert set(pt.trainable(model)) == {"bert.ptuning", "classifier.weight", "classifier.bias"}
    assert torch.equal(answer(model, tiny_batch("bert")), expected)


def test_what_is_kept_in_inference_mode_can_still_be_trained():
    model = PTuning(num_virtual_tokens=P).attach(tiny_model("llama"))
    with torch.inference_mode():
        pt.adapted(model).drop_encoder(model)
    assert set(gradients(model, model(**tiny_batch("llama")).loss)) == {"model.ptuning"}


def test_the_lstm_drops_out_in_training_alone():
    model, batch = adapted("llama", encoder_dropout=0.5), tiny_batch("llama")
    assert torch.equal(answer(model, batch), answer(model, batch))
    model.train()
    assert not torch.equal(answer(model, batch), answer(model, batch))


def test_what_is_drawn_is_fixed_by_the_seed_and_nobody_elses_numbers_are_drawn():
    before = torch.get_rng_state()
    one, two, other = (weights(PTuning(init_seed=seed).attach(tiny_model("llama"))) for seed in (1, 1, 2))
    assert same(one, two)
    assert not torch.equal(one["model.ptuning_table"], other["model.ptuning_table"])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"encoder": "gru"}, "encoder is 'gru'; it must be one of 'lstm', 'mlp', 'none'"),
        ({"encoder_hidden_size": 0}, "encoder_hidden_size is 0; it must be a whole number ≥ 1"),
        ({"encoder_dropout": 1.0}, "encoder_dropout is 1.0; it must be a number ≥ 0 and < 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        PTuning(**settings)


# ---- anywhere in a template

PLACE = 96  # an ordinary token of the tiny models


def template(kind: str) -> dict[str, torch.Tensor]:
    """The batch's texts with P places each, somewhere among their tokens; no other token is the placeholder."""
    batch = tiny_batch(kind, side="left" if kind == "gpt2" else "right")
    ids = batch["input_ids"]
    ids[ids == PLACE] = 5
    for row, places in enumerate(([1, 3, 4, 8], [0, 2, 3, 5], [0, 1, 2, 3])):
        ids[row, batch["attention_mask"][row].nonzero().flatten()[places]] = PLACE
    batch["input_ids"] = ids
    assert (ids == PLACE).sum(1).tolist() == [P] * 3
    return batch


@pytest.mark.parametrize("encoder", ["lstm", "mlp", "none"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_among_a_text_outputs_and_gradients_are_those_of_embeddings_put_there(kind, encoder):
    method = PTuning(
        num_virtual_tokens=P, encoder=encoder, encoder_hidden_size=HIDDEN, placeholder_token_id=PLACE
    )
    model, batch = moved(method.attach(tiny_model(kind))), template(kind)
    mine = model(**batch)
    found = gradients(model, mine.loss)
    assert set(found) == set(pt.trainable(model))
    part = pt.attached(model)["default"].parts[0]
    body, plain = next(iter(part.places.values()))[0], tiny_model(kind)
    virtual, ids = part.maker(body), batch.pop("input_ids")
    rows = plain.get_input_embeddings()(ids).detach().clone()
    rows[ids == PLACE] = virtual.repeat(3, 1)
    theirs = plain(inputs_embeds=rows, **batch)
    torch.testing.assert_close(mine.logits, theirs.logits)
    torch.testing.assert_close(found, gradients(model, theirs.loss), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_places_before_a_text_are_virtual_tokens_before_it(kind):
    before, among = (
        moved(PTuning(num_virtual_tokens=P, placeholder_token_id=token).attach(tiny_model(kind)))
        for token in (None, PLACE)
    )
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(1))
    placed = torch.cat([torch.full((2, P), PLACE), ids], 1)
    torch.testing.assert_close(before(input_ids=ids).logits, among(input_ids=placed).logits[:, P:])
    how = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    written = among.generate(input_ids=placed, attention_mask=torch.ones_like(placed), **how)
    assert torch.equal(
        written[:, P:], before.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
    )


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_placeholder_that_the_model_writes_is_a_word(use_cache):
    model = moved(PTuning(num_virtual_tokens=P, placeholder_token_id=PLACE).attach(tiny_model("llama")))
    ids = torch.tensor([[PLACE] * P + [7, 8]])

    def writes_it(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -1e4).index_fill(1, torch.tensor([PLACE]), 0.0)

    how = {"do_sample": False, "max_new_tokens": 3, "logits_processor": [writes_it], "use_cache": use_cache}
    texts = model.generate(ids, output_logits=True, return_dict_in_generate=True, **how)
    rows = tiny_model("llama").get_input_embeddings()(texts.sequences[:, :-1])
    part = pt.attached(model)["default"].parts[0]
    rows = torch.cat([part.maker(model.model)[None], rows[:, P:]], 1)
    expected = tiny_model("llama")(inputs_embeds=rows).logits[:, P + 1 :]
    torch.testing.assert_close(torch.stack(texts.logits, 1), expected, rtol=1e-4, atol=1e-5)


def test_among_a_text_it_is_saved_dropped_and_taken_out_like_before_it(tmp_path):
    method = PTuning(num_virtual_tokens=P, placeholder_token_id=PLACE)
    model, batch = moved(method.attach(tiny_model("llama"))), template("llama")
    expected = answer(model, batch)
    pt.save(method.drop_encoder(model), tmp_path)
    assert pt.adapted(model).placeholder_token_id == PLACE
    assert torch.equal(answer(pt.load(tiny_model("llama"), tmp_path), batch), expected)
    assert not torch.equal(answer(pt.detach(model), batch), expected)
    assert differences(tensors(tiny_model("llama")), tensors(model)) == []


def test_texts_without_their_places_are_refused():
    model = PTuning(num_virtual_tokens=P, placeholder_token_id=PLACE).attach(tiny_model("llama"))
    batch = template("llama")
    batch["input_ids"][1] = 5
    with pytest.raises(ValueError, match=r"the token 96 stands .* \[4, 0, 4\] times; expected 4 in each"):
        model(**batch)
    with pytest.raises(ValueError, match="give it input_ids, not inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 3, WIDTH))
    plain = tiny_model("llama")
    with pytest.raises(
        ValueError, match="placeholder_token_id is 97; expected one of the 97 tokens of this model"
    ):
        PTuning(placeholder_token_id=97).attach(plain)
    assert pt.attached(plain) == {}


def test_a_state_space_models_cache_goes_on_behind_the_places():
    config = hf.MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4)
    method = PTuning(num_virtual_tokens=P, placeholder_token_id=PLACE)
    model = moved(method.attach(made(hf.MambaForCausalLM, config)))
    ids = torch.tensor([[5, 96, 6, 96, 96, 96, 7]])
    texts = [model.generate(ids, use_cache=use, do_sample=False, max_new_tokens=4) for use in (True, False)]
    assert torch.equal(*texts)
    with pytest.raises(ValueError, match=r"\[3\] times; expected 4 in each"):
        model.generate(ids[:, 2:], use_cache=True, do_sample=False, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"\[0\] times; expected 4 in each"):
        model.generate(ids[:, -1:], use_cache=True, do_sample=False, max_new_tokens=4)


def places(token: int = PLACE, **settings: object) -> PTuning:
    return PTuning(num_virtual_tokens=P, encoder="none", placeholder_token_id=token, **settings)


BESIDE = {
    "prompt": pt.PromptTuning(num_virtual_tokens=3),
    "prefix": pt.PrefixTuning(num_virtual_tokens=3),
    "pasta": pt.PASTA(special_token_ids=(7, 84), num_special=1),
    "adapter": pt.Adapter(bottleneck=3),
}


@pytest.mark.parametrize(("kind", "beside"), [("llama", name) for name in BESIDE] + [("t5", "prompt")])
def test_what_is_tried_out_beside_it_is_tried_with_words_alone(kind, beside):
    """A trial's text has no places. Which of the two came first makes no difference."""
    batch, found = template(kind), []
    for order in (["places", beside], [beside, "places"]):
        model = tiny_model(kind)
        for name in order:
            (BESIDE | {"places": places()})[name].attach(model, name=name)
        draw = torch.Generator().manual_seed(0)
        for name in sorted(pt.trainable(model)):
            p = model.get_parameter(name)
            p.data.add_(0.1 * torch.randn(p.shape, generator=draw))
        found.append(model(**batch))
        assert all(g.abs().max() > 0 for g in gradients(model, found[-1].loss).values())
        with pytest.raises(ValueError, match=r"\[0, 0\] times; expected 4 in each"):
            model(
                input_ids=batch["input_ids"][:2, :1] * 0 + 5,
                **({"labels": batch["labels"]} if kind == "t5" else {}),
            )
    torch.testing.assert_close(found[0].logits, found[1].logits)


def test_what_a_model_reads_past_is_still_seen_in_a_trial():
    """Mamba's dt_proj is never called, and `all-linear` leaves it out."""
    config = hf.MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = places().attach(made(hf.MambaForCausalLM, config), name="places")
    pt.LoRA(r=2, target_modules="all-linear").attach(model, name="lora")
    adapted = {name.split(".")[-2] for name in pt.trainable(model) if name.endswith("lora_A@lora")}
    assert adapted == {"in_proj", "x_proj", "out_proj"}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_place(side):
    model, ids = moved(places(0).attach(tiny_model("llama"))), torch.tensor([[7, 0, 8, 0, 0, 0, 9, 3]])
    zeros, parts = torch.zeros(1, 3, dtype=torch.long), [ids, torch.ones_like(ids)]
    padded, mask = (torch.cat([zeros, x] if side == "left" else [x, zeros], 1) for x in parts)
    said = model(input_ids=padded, attention_mask=mask).logits
    torch.testing.assert_close(said[:, 3:] if side == "left" else said[:, :-3], model(input_ids=ids).logits)


def test_the_words_that_stand_for_a_prompt_are_no_places():
    """A prompt's virtual tokens have an ordinary word's id inside of the model, here 3: that of the places."""
    batch = template("llama")
    ids = batch["input_ids"]
    ids[ids == 3] = 5
    model = pt.PromptTuning(num_virtual_tokens=P).attach(tiny_model("llama"), name="prompt")
    moved(places(PLACE).attach(model, name="places"))
    other = pt.PromptTuning(num_virtual_tokens=P).attach(tiny_model("llama"), name="prompt")
    places(3).attach(other, name="places")
    for name in pt.trainable(model):
        other.get_parameter(name).data.copy_(model.get_parameter(name))
    expected = model(**batch).logits
    batch["input_ids"] = ids.masked_fill(ids == PLACE, 3)
    torch.testing.assert_close(other(**batch).logits, expected)


def test_the_words_that_stand_for_a_prompt_are_no_special_tokens():
    """As above, for PASTA: its vectors go to the text's own."""
    ids = torch.tensor([[7, 3, 8, 4, 9]])
    found = []
    for special in ((3,), (96,)):
        model = pt.PromptTuning(num_virtual_tokens=P).attach(tiny_model("llama"), name="prompt")
        moved(pt.PASTA(special_token_ids=special).attach(model, name="pasta"))
        found.append(model)
    table = found[1].get_input_embeddings().weight
    table.data[96] = table.data[3]
    said = [m(input_ids=x).logits for m, x in zip(found, (ids, ids.masked_fill(ids == 3, 96)), strict=True)]
    torch.testing.assert_close(*(logits[..., :3] for logits in said))


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_two_of_them_have_places_of_their_own(kind):
    config = hf.MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = tiny_model(kind) if kind == "llama" else made(hf.MambaForCausalLM, config)
    places(96).attach(model, name="one")
    moved(places(95).attach(model, name="two"))
    ids = torch.tensor([[5, 96, 6, 96, 96, 96, 95, 95, 95, 95, 7]])
    assert all(g.abs().max() > 0 for g in gradients(model, model(input_ids=ids, labels=ids).loss).values())
    texts = [model.generate(ids, use_cache=use, do_sample=False, max_new_tokens=4) for use in (True, False)]
    assert torch.equal(*texts)
    places(96).attach(model, name="again")
    with pytest.raises(ValueError, match=r"two attachments .* the places of the token 96: switch one of"):
        model(input_ids=ids)
    pt.switch(model, "two", "again")(input_ids=ids)


def test_a_cache_that_was_filled_without_the_places_is_refused():
    model, ids = moved(places().attach(tiny_model("llama"))), torch.tensor([[5, 6, 96, 96, 7, 96, 96]])
    before = tiny_model("llama")(input_ids=ids[:, :2], use_cache=True, return_dict=False)[-1]
    with pytest.raises(ValueError, match="filled without the places of the token 96: compute the"):
        model(input_ids=ids[:, 2:], **{cache_key(model.model): before})


@pytest.mark.parametrize("method", [places(), BESIDE["prompt"], BESIDE["pasta"]])
def test_a_cache_in_a_tuple_is_marked_like_any(method):
    model, ids = moved(method.attach(tiny_model("llama").model)), torch.tensor([[5, 6, 96, 96, 7, 96, 96, 8]])
    _, cache = model(input_ids=ids[:, :-1], use_cache=True, return_dict=False)
    last = model(input_ids=ids[:, -1:], **{cache_key(model): cache}).last_hidden_state
    torch.testing.assert_close(last, model(input_ids=ids).last_hidden_state[:, -1:], rtol=1e-4, atol=1e-5)
