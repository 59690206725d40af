"""P-tuning: the prompt encoder against HF PEFT's, published counts, and dropping it after training."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

import pefttutor as pt
from pefttutor import PTuning
from tests.cases import answer, gradients, moved
from tests.pictures import differences, tensors
from tests.tiny import same, tiny_batch, tiny_model, weights

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
