"""What the estimators refuse, what they say then, and which model they take a config for."""

import pytest
import torch
import transformers as hf

import pefttutor
from pefttutor.memory import estimate, estimate_serving
from tests.memory.models import config_of, llama


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        (hf.RobertaConfig(), {}, "'roberta' has no formula.*llama, mistral.*measure"),
        (torch.nn.Linear(2, 2), {}, "Linear.*there are some for llama"),
        (
            llama(),
            {"weight_dtype": "int4"},
            "weight_dtype is 'int4'; the estimator knows 'float32', 'bfloat16'",
        ),
        (llama(), {"optimizer": "lion"}, "optimizer is 'lion'; the estimator knows 'adamw'"),
        (llama(), {"attention": "ring"}, "attention is 'ring'; the estimator knows 'eager', 'sdpa'"),
        (llama(), {"quantization": "int3"}, "quantization is 'int3'"),
        (llama(), {"device": "tpu"}, "device is 'tpu'"),
        (llama(), {"loss": len}, "loss is"),
        (llama(), {"batch_size": 0}, "batch_size is 0; it must be a whole number"),
        (llama(), {"sequence_length": 1.5}, "sequence_length is 1.5"),
        (llama(), {"sequence_length": 513}, "sequence_length is 513, but this model has positions for 512"),
        (llama(num_key_value_heads=3), {}, "8 heads can't share 3 key and value heads"),
        (
            hf.BloomConfig(hidden_size=64, n_head=8),
            {"attention": "sdpa"},
            "BLOOM's attention as 'eager' only",
        ),
        (hf.T5Config(), {"attention": "flash_attention_2"}, "T5's attention as 'eager' or 'sdpa' only"),
        (hf.ViTConfig(image_size=10, patch_size=16), {}, "image_size 10 is smaller than patch_size 16"),
        (llama(), {"gradient_checkpointing": "yes"}, "gradient_checkpointing is 'yes'.*None, True, False"),
        (llama(), {"padding": "left"}, "padding is 'left'"),
        (hf.GPT2Config(n_embd=62, n_head=4), {}, "hidden_size 62 is no multiple of 4 heads"),
    ],
)
def test_bad_input_is_refused_with_what_is_supported(config, options, says):
    with pytest.raises(ValueError, match=says):
        estimate(config, **options)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("llama", "hidden_size", 0),
        ("llama", "num_hidden_layers", 0),
        ("llama", "num_hidden_layers", -2),
        ("llama", "num_attention_heads", 0),
        ("llama", "num_key_value_heads", 0),
        ("llama", "intermediate_size", 0),
        ("llama", "vocab_size", 0),
        ("gpt2", "num_attention_heads", 0),
        ("bert", "hidden_size", 0),
        ("bloom", "num_attention_heads", 0),
        ("t5", "num_attention_heads", 0),
        ("t5", "num_decoder_layers", 0),
    ],
)
@pytest.mark.parametrize("function", [estimate, estimate_serving])
def test_a_config_that_counts_nothing(function, kind, name, value):
    config = config_of(kind)
    setattr(config, name, value)
    with pytest.raises(ValueError, match=f"the config's {name} is {value}; it must be a whole number ≥ 1"):
        function(config)


@pytest.mark.parametrize("function", [estimate, estimate_serving])
def test_what_is_no_method(function):
    with pytest.raises(TypeError, match=r"method is the class LoRA; give an instance of it: LoRA\("):
        function(llama(), pefttutor.LoRA)
    with pytest.raises(TypeError, match=r"method is 'lora'; expected something with attach\(model\)"):
        function(llama(), "lora")


def test_attention_is_that_of_the_architecture_where_none_is_named():
    bloom, bert = config_of("bloom"), config_of("bert")
    assert estimate(bloom) == estimate(bloom, attention="eager")
    assert estimate(bert) == estimate(bert, attention="sdpa") != estimate(bert, attention="eager")


# ---- which model a config stands for


@pytest.mark.parametrize(
    ("kind", "named", "like"),
    [
        ("bert", "BertForQuestionAnswering", "BertForSequenceClassification"),
        ("bert", "BertForPreTraining", "BertForSequenceClassification"),
        ("vit", "ViTModel", "ViTForImageClassification"),
        ("bloom", "BloomModel", "BloomForCausalLM"),
        ("llama", "LlamaModel", "LlamaForCausalLM"),
        ("t5", "T5EncoderModel", "T5ForConditionalGeneration"),
        ("bert", "BertForMaskedLM", "BertForMaskedLM"),
        ("llama", "LlamaForSequenceClassification", "LlamaForSequenceClassification"),
        ("gpt2", "NoSuchClass", "GPT2LMHeadModel"),
    ],
)
def test_a_config_stands_for_the_class_that_it_names_where_there_is_a_known_head(kind, named, like):
    config = config_of(kind)
    config.architectures = [named]
    with torch.device("meta"):
        model = getattr(hf, like)(config)
    assert estimate(config, sequence_length=64).values == sum(p.numel() for p in model.parameters())


def test_models_without_a_known_head():
    with pytest.raises(ValueError, match=r"T5EncoderModel has an encoder alone.*T5ForConditionalGeneration"):
        estimate(hf.T5EncoderModel(config_of("t5")))
    with pytest.raises(ValueError, match="BertForQuestionAnswering has no head that the estimator knows"):
        estimate(hf.BertForQuestionAnswering(config_of("bert")))
