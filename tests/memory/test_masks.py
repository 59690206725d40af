"""Padding, sliding windows, checkpointing, masked words and wide numbers, against measurement."""

import re

import pytest
import torch
import transformers as hf

from pefttutor import memory
from tests.memory.models import KINDS, TARGET_LENGTH, batch_of, config_of, held, method_of, model_of
from tests.tiny import checkpointed

TEXTS = [kind for kind in KINDS if kind not in ("vit", "bloom")]


def ratio(model, batch, method=None, attention="sdpa", **options):
    rows, length = batch["input_ids"].shape
    estimated = memory.estimate(
        model, method, batch_size=rows, sequence_length=length, attention=attention, device="cpu", **options
    )
    if method is not None:
        method.attach(model)
    return sum(estimated.activations.values()) / held(model, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["full", "query and value"])
@pytest.mark.parametrize("kind", TEXTS)
def test_padded_batches(kind, how, dtype):
    for attention in ("sdpa", "eager"):
        model, batch = model_of(kind, attention, dtype=dtype), batch_of(kind, 2, 64)
        batch["attention_mask"] = torch.ones(2, 64).long()
        batch["attention_mask"][0, -9:] = 0
        method = None if how == "full" else method_of(kind, how)
        found = ratio(model, batch, method, attention, padding=True, target_length=TARGET_LENGTH)
        assert found == pytest.approx(1, abs=0.02)


def test_padding_costs_one_mask_a_layer_and_nothing_elsewhere():
    without, padded = (
        sum(memory.estimate(config_of("bert"), sequence_length=50, padding=on).activations.values())
        for on in (False, True)
    )
    assert padded - without == 3 * 50 * 50 * 4
    eager, fused, same = (
        memory.estimate(config_of("llama"), sequence_length=50, padding=on, attention=attention)
        for on, attention in ((True, "eager"), (True, "flash_attention_2"), (False, "flash_attention_2"))
    )
    assert eager == memory.estimate(config_of("llama"), sequence_length=50, attention="eager")
    assert fused == same


@pytest.mark.parametrize("length", [15, 16, 64])
@pytest.mark.parametrize("kind", ["mistral", "half of qwen2"])
def test_sliding_windows(kind, length):
    size = {
        key: config_of("llama").to_dict()[key] for key in ("vocab_size", "hidden_size", "intermediate_size")
    }
    size |= {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "sliding_window": 16}
    torch.manual_seed(0)
    if kind == "mistral":
        config = hf.MistralConfig(**size, attn_implementation="sdpa")
    else:
        config = hf.Qwen2Config(
            **size, use_sliding_window=True, max_window_layers=2, attn_implementation="sdpa"
        )
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert ratio(model, batch_of("llama", 2, length)) == pytest.approx(1, abs=0.01)
    with torch.no_grad():
        cache = model.eval()(
            input_ids=batch_of("llama", 2, length)["input_ids"], use_cache=True
        ).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert memory.estimate_serving(model, batch_size=2, sequence_length=length).kv_cache == real


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["full", "every"])
def test_masked_words(how, dtype):
    torch.manual_seed(0)
    model = hf.BertForMaskedLM._from_config(config_of("bert", "sdpa"), dtype=dtype)
    batch = batch_of("llama", 2, 24)
    assert ratio(model, batch, None if how == "full" else method_of("bert", how)) == pytest.approx(
        1, abs=0.01
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("how", ["full", "query and value"])
def test_float64_of_which_norms_and_loss_take_half(kind, how, attention):
    model = model_of(kind, attention, dtype=torch.float64)
    method = None if how == "full" else method_of(kind, how)
    found = ratio(model, batch_of(kind, 2, 24), method, attention, target_length=TARGET_LENGTH)
    assert found == pytest.approx(1, abs=0.02)


def test_checkpoints_that_keep_their_inputs_out_of_sight_are_refused():
    model, batch = model_of("llama"), batch_of("llama", 2, 24)
    checkpointed(model.train(), reentrant=False)
    with pytest.raises(ValueError, match=r"model\.(\w+)\({'use_reentrant': True}\)") as refused:
        memory.measure(lambda: model(**batch).loss.backward(), model=model)
    enable = getattr(model, re.search(r"model\.(\w+)\(", str(refused.value))[1])
    enable()
    with pytest.raises(ValueError, match="can't be measured"):
        memory.measure(lambda: model(**batch).loss.backward(), model=model)
    enable({"use_reentrant": True})
    estimated = memory.estimate(model, batch_size=2, sequence_length=24, attention="eager", device="cpu")
    measured = memory.measure(lambda: model(**batch).loss.backward(), model=model)
    assert memory.compare(estimated, measured)["activations"].ratio == pytest.approx(1, abs=0.01)
