"""The embedded models: whole, loadable by plain transformers, one tokenizer; and what they were measured to do."""

import json
from itertools import pairwise
from statistics import mean, stdev

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from world import corpus, measure, pretrain, tasks

from pefttutor import models

SHIPPED = pretrain.shipped()
PARAMETERS = {
    "campus-nano": 1_202_560,
    "campus-small": 5_622_784,
    "campus-base": 14_192_000,
    "campus-encoder": 3_490_304,
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


def test_all_weights_together_stay_below_sixty_megabytes():
    files = list(pretrain.MODELS.glob("*/model.safetensors"))
    assert {f.parent.name for f in files} == set(PARAMETERS)
    assert sum(f.stat().st_size for f in files) < 60e6


def test_larger_models_read_the_world_better_row_by_row():
    """Held-out text in rows: each size beats the smaller one by many standard errors, and on nearly all rows."""
    tokenizer = Tokenizer.from_file(str(pretrain.TOKENIZER))
    flat, _ = corpus.shard(tokenizer, corpus.HELD_OUT_SEED, 1500)
    rows = torch.from_numpy(flat[:24_576].astype("int64")).view(-1, 1, 512)
    losses = []
    for name in measure.CAUSAL:
        model, _ = models.load(name)
        with torch.no_grad():
            losses.append([pretrain.loss_of(model.eval(), row, False).item() for row in rows])
        stored = measure.stored()[f"held_out//{name}/0"]
        assert mean(losses[-1]) == pytest.approx(stored, abs=0.002)
    for smaller, larger in pairwise(losses):
        gains = [a - b for a, b in zip(smaller, larger, strict=True)]
        assert mean(gains) > 5 * stdev(gains) / len(gains) ** 0.5
        assert sum(gain > 0 for gain in gains) > 0.9 * len(gains)


def test_a_domain_never_read_can_be_learned():
    found = measure.stored()
    for name in ("bank_text", "clinic_text", "velan_text"):
        pairs = [found[f"domain/{name}/{measure.TUNED}/{seed}"] for seed in measure.SEEDS]
        assert all(pair["after"] < 30 < 3072 < pair["before"] for pair in pairs)


def _mean(what: str, task: str, model: str) -> float:
    found = measure.stored()
    values = [found[k] for seed in measure.SEEDS if (k := f"{what}/{task}/{model}/{seed}") in found]
    return mean(v["score"] if isinstance(v, dict) else v for v in values)


SCORED = [t for t in tasks.ALL if t.metric != "perplexity"]
SPOKEN = [t.name for t in SCORED if t.kind != "tagging"]


def test_every_number_of_the_table_has_been_measured():
    assert set(measure._keys()) == set(measure.stored())


def test_adapting_takes_at_least_ten_tasks_from_chance_to_near_the_ceiling():
    found = measure.stored()
    learned = [t.name for t in SCORED if _mean("full", t.name, measure.TUNED) >= 0.9 * t.ceiling]
    assert len(learned) >= 10
    near_chance = [
        n for n in SPOKEN if abs(_mean("shots0", n, measure.TUNED) - found[f"chance/{n}//0"]) < 0.1
    ]
    assert len(set(learned) & set(near_chance)) >= 9  # a tagging task has no zero-shot prompt


def test_small_is_fine_tuned_in_less_than_a_minute():
    name, task = measure.TIMED
    runs = [measure.stored()[f"full/{task}/{name}/{seed}"] for seed in measure.SEEDS]
    assert all(run["train_s"] < 60 and run["score"] > 0.9 for run in runs)


@pytest.mark.parametrize("model", measure.GAPS)
def test_on_six_tasks_full_fine_tuning_has_room_above_a_converged_head_and_below_the_ceiling(model):
    gaps = {
        gap: (
            _mean("few_head", gap, model),
            _mean(f"few{measure.searched(gap, model)[1]:g}", gap, model),
        )
        for gap in measure.GAPS[model]
    }
    real = [gap for gap, (head, full) in gaps.items() if full - head >= 0.15 and 0.75 <= full <= 0.98]
    pairs = {gap.split("@")[0] for gap in real} & {"paraphrase", "pages", "better", "guests", "entailment"}
    assert len(real) >= 6, gaps
    assert len(pairs) >= 2, gaps


@pytest.mark.parametrize("model", measure.GAPS)
def test_a_head_found_otherwise_sees_the_same_gaps(model):
    """The tasks were chosen by `fit_head`; least squares, with leave-one-out, weren't asked then."""
    heads = {
        gap: (_mean("few_head", gap, model), _mean("few_squares", gap, model))
        for gap in measure.GAPS[model]
        if measure._classified(gap)
    }
    assert all(other <= head + 0.05 for head, other in heads.values()), heads


def test_rank_matters_on_memory():
    model, gap = measure.RANKED
    rates = {way: measure.searched(gap, model, way)[1] for way in ("lora1x", "lora4x", "")}
    scores = {way: _mean(f"few{way}{lr:g}", gap, model) for way, lr in rates.items()}
    assert scores["lora1x"] < min(scores["lora4x"], scores[""]) - 0.2, scores
    assert _mean("few_head", gap, model) < 0.05


def test_examples_in_the_context_help_base_by_twenty_points_on_five_tasks_and_nano_less():
    gain = {
        m: {t: _mean("shots4", t, m) - _mean("shots0", t, m) for t in SPOKEN}
        for m in ("campus-base", measure.TUNED)
    }
    helped = {model: sum(g >= 0.2 for g in gains.values()) for model, gains in gain.items()}
    assert helped["campus-base"] >= 5
    assert helped[measure.TUNED] < helped["campus-base"]
    assert sum(gain[measure.TUNED].values()) < sum(gain["campus-base"].values())


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
