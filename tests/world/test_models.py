"""The embedded models: whole, loadable by plain transformers, one tokenizer; and what they were measured to do."""

import json

import pytest
import torch
import transformers
from world import measure, pretrain

from pefttutor import models

SHIPPED = pretrain.shipped()
PARAMETERS = {
    "campus-nano": 1_202_560,
    "campus-small": 5_622_784,
    "campus-base": 15_373_696,
    "campus-encoder": 4_146_944,
}


@pytest.mark.parametrize("name", SHIPPED)
def test_plain_transformers_loads_the_same_model(name):
    ours, tokenizer = models.load(name)
    cls = transformers.AutoModelForMaskedLM if "encoder" in name else transformers.AutoModelForCausalLM
    plain = cls.from_pretrained(pretrain.MODELS / name, dtype=torch.float32)
    weights = dict(plain.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in ours.named_parameters())
    assert sum(p.numel() for p in plain.parameters()) == PARAMETERS[name]
    assert type(plain).__name__ == ("BertForMaskedLM" if "encoder" in name else "LlamaForCausalLM")
    text = "Elsa Foxley is a baker."
    assert transformers.AutoTokenizer.from_pretrained(pretrain.MODELS / name)(text) == tokenizer(text)
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_causal_models_have_the_biases_that_bitfit_needs():
    model, _ = models.load("campus-nano")
    names = dict(model.named_parameters())
    assert all(f"model.layers.0.self_attn.{p}_proj.bias" in names for p in "qkvo")
    assert all(f"model.layers.0.mlp.{p}_proj.bias" in names for p in ("gate", "up", "down"))


def test_all_weights_together_stay_below_fifty_megabytes():
    files = list(pretrain.MODELS.glob("*/model.safetensors"))
    assert len(files) == len(SHIPPED)
    assert sum(f.stat().st_size for f in files) < 50e6


def test_larger_models_read_the_world_better_and_a_domain_can_be_learned():
    found = measure.stored()
    nano, small, base = (found[f"held_out//{name}/0"] for name in measure.CAUSAL)
    assert nano - small > 0.02
    assert small - base > 0.02
    for name in ("bank_text", "clinic_text", "velan_text"):
        pairs = [found[f"domain/{name}/{measure.TUNED}/{seed}"] for seed in measure.SEEDS]
        assert all(pair["after"] < 0.5 * pair["before"] for pair in pairs)


def test_the_cards_quote_what_is_stored():
    for name in SHIPPED:
        card = (pretrain.MODELS / name / "README.md").read_text()
        digest = next(
            line.split()[0]
            for line in (pretrain.MODELS / "SHA256SUMS").read_text().splitlines()
            if line.endswith(f"{name}/model.safetensors")
        )
        assert digest in card
        assert f"--train {name}" in card
    assert measure.table() in (pretrain.MODELS.parent / "README.md").read_text()
    assert json.loads(measure.STORE.read_text())
