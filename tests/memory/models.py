"""Tiny models of every architecture that the estimator knows, and an estimate of one beside its measurement."""

from functools import partial

import pytest
import torch
import transformers as hf

import pefttutor
from pefttutor import memory
from pefttutor.memory.measured import watch_saved
from tests.tiny import checkpointed, made, model_class, tiny_config

SMALL = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
TEXT = {"bos_token_id": 1, "eos_token_id": 2}


def llama(**changes):
    return hf.LlamaConfig(
        **(SMALL | {"num_attention_heads": 8, "max_position_embeddings": 512} | TEXT | changes)
    )


LORA = pefttutor.LoRA(r=4)
N = sum(p.numel() for p in hf.LlamaForCausalLM(llama()).parameters())
ADAPTED = 2 * 2 * 4 * (64 + 64)

KINDS = ("llama", "qwen3", "gpt2", "bloom", "bert", "t5", "vit")
QUERY_VALUE = {
    "gpt2": ("c_attn",),
    "bloom": ("query_key_value",),
    "bert": ("query", "value"),
    "t5": ("q", "v"),
}
EVERY = {
    "gpt2": ("c_attn", "c_fc", "c_proj"),
    "bloom": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "bert": ("query", "key", "value", "dense"),
    "t5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    "vit": ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
}
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGET_LENGTH = 7


OWN = {
    "llama": {"attention_bias": False},
    "qwen3": {"head_dim": 16},
    "gpt2": {"n_positions": 128},
    "bert": {"max_position_embeddings": 512, "num_labels": 2},
    "t5": {"d_kv": 10, "feed_forward_proj": "gated-gelu"},
    "vit": {"image_size": 64, "num_labels": 5, "patch_size": 8},
}  # what is larger than in tests.tiny, or differs from it


def config_of(kind, attention="eager", dropout=0.0):
    sizes = {"width": 96, "feed_forward": 160, "layers": 3, "heads": 8, "vocabulary": 500}
    config = tiny_config(kind, dropout=dropout, **sizes, **OWN.get(kind, {}))
    config._attn_implementation = attention
    return config


def model_of(kind, attention="eager", dropout=0.0, dtype=torch.float32):
    config = config_of(kind, attention, dropout)
    return made(partial(model_class(kind)._from_config, dtype=dtype), config).train()


def batch_of(kind, batch_size, length, dtype=torch.float32):
    if kind == "vit":
        return {
            "pixel_values": torch.ones(batch_size, 3, 64, 64, dtype=dtype),
            "labels": torch.zeros(batch_size).long(),
        }
    ids = torch.arange(batch_size * length).view(batch_size, length) % 400 + 3
    labels = {"bert": torch.zeros(batch_size).long(), "t5": ids[:, :TARGET_LENGTH].contiguous()}.get(
        kind, ids
    )
    return {"input_ids": ids, "labels": labels}


def method_of(kind, how):
    targets = (EVERY if how.startswith("every") else QUERY_VALUE).get(kind)
    targets = targets or (SEVEN if how.startswith("every") else ("q_proj", "v_proj"))
    return pefttutor.LoRA(r=4, target_modules=targets, lora_dropout=0.1 if how.endswith("dropout") else 0.0)


def estimated_and_measured(
    kind,
    how,
    *,
    batch_size=2,
    length=24,
    checkpointing=False,
    attention="eager",
    dropout=0.0,
    dtype=torch.float32,
):
    model = model_of(kind, attention, dropout, dtype)
    method = None if how == "full" else method_of(kind, how)
    estimated = memory.estimate(
        model, method, batch_size=batch_size, sequence_length=length, target_length=TARGET_LENGTH,
        attention=attention, gradient_checkpointing=checkpointing, device="cpu",
    )  # fmt: skip
    if method:
        method.attach(model)
    if checkpointing:
        checkpointed(model, reentrant=True)
    with watch_saved(model.train()) as saved:
        model(**batch_of(kind, batch_size, length, dtype)).loss.backward()
    return estimated, saved, model


def assert_estimate_is_measured(kind, method, dtype=torch.float32):
    """What is estimated of a step, before the method is attached, is what trains and what autograd keeps."""
    model, options = model_of(kind, dtype=dtype), {"attention": "eager", "device": "cpu"}
    estimated = memory.estimate(model, method, batch_size=2, sequence_length=24, **options)
    method.attach(model)
    measured = held(model, batch_of(kind, 2, 24, dtype))
    assert estimated.trained == sum(pefttutor.trainable(model).values()) == method.count(model)
    assert sum(estimated.activations.values()) == pytest.approx(measured, rel=0.01)
    return estimated, model


def held(model, batch):
    """Bytes that autograd keeps in one training step."""
    with watch_saved(model.train()) as saved:
        model(**batch).loss.backward()
    return saved.peak_bytes


# ---- without values, at their true size

T5 = {"d_kv": 64, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}


def untied(model_class, config):
    """T5 1.1 and mT5 have an output head of their own; a config of transformers 5 can't say so, a model can."""
    with torch.device("meta"):
        model = model_class(config)
        model.lm_head = torch.nn.Linear(config.d_model, config.vocab_size, bias=False)
    return model


def t0_3b():
    config = hf.T5Config(vocab_size=32128, d_model=2048, d_ff=5120, num_layers=24, num_heads=32, **T5)
    return untied(hf.T5ForConditionalGeneration, config)


def mt0(**size):
    return untied(
        hf.MT5ForConditionalGeneration, hf.MT5Config(vocab_size=250112, num_layers=24, **size, **T5)
    )
