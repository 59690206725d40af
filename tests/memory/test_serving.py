"""A model that answers: its cache of keys and values, and many adapters over one base."""

import pytest
import torch
import transformers as hf

import pefttutor
from pefttutor.memory import estimate_serving
from tests.memory.models import ADAPTED, LORA, SMALL, N, config_of, llama, model_of


def test_serving_many_adapters_over_one_base():
    one, many = (estimate_serving(llama(), LORA, adapters=n, sequence_length=50) for n in (1, 100))
    assert many.adapter_weights == 100 * one.adapter_weights == 100 * 4 * ADAPTED
    assert many.weights == one.weights == 4 * N
    assert one.kv_cache == 2 * 2 * 64 * 50 * 4
    assert one.gradients == one.optimizer == 0
    assert one.activations == {}
    grouped = estimate_serving(llama(num_key_value_heads=2), sequence_length=50, cache_dtype="float16")
    assert grouped.kv_cache == one.kv_cache / 4 / 2
    with pytest.raises(ValueError, match="encoder"):
        estimate_serving(hf.BertConfig(**SMALL, num_attention_heads=8))


def test_each_adapter_brings_its_places_along():
    method = pefttutor.PaFi(fraction=0.25)
    one, ten = (estimate_serving(llama(), method, adapters=n, sequence_length=50) for n in (1, 10))
    assert ten.adapter_weights == 10 * one.adapter_weights
    values = sum(pefttutor.trainable(method.attach(hf.LlamaForCausalLM(llama()))).values())
    assert one.adapter_weights == values * (4 + 4)  # a value and its place


def test_a_quantised_base_without_adapters():
    alone, adapted = (estimate_serving(llama(), method, quantization="nf4") for method in (None, LORA))
    assert alone.quantized_weights == adapted.quantized_weights > 0
    assert (alone.weights, alone.adapter_weights) == (adapted.weights, 0)
    assert estimate_serving(llama(), adapters=9) == estimate_serving(llama())


def test_the_cache_of_an_encoder_decoder_is_what_transformers_keeps():
    model = model_of("t5").eval()
    ids = torch.ones(2, 20).long()
    with torch.no_grad():
        cache = model(input_ids=ids, decoder_input_ids=ids[:, :7], use_cache=True).past_key_values
    parts = (cache.self_attention_cache, cache.cross_attention_cache)
    real = sum(layer.keys.nbytes + layer.values.nbytes for part in parts for layer in part.layers)
    assert estimate_serving(model, batch_size=2, sequence_length=20, target_length=7).kv_cache == real


@pytest.mark.parametrize("length", [0, -3, 1.5])
def test_a_target_length_that_is_none(length):
    with pytest.raises(ValueError, match=f"target_length is {length}; it must be a whole number"):
        estimate_serving(config_of("t5"), target_length=length)


def test_an_encoder_has_no_cache():
    with pytest.raises(ValueError, match="T5EncoderModel is an encoder"):
        estimate_serving(hf.T5EncoderModel(config_of("t5")))
