"""Estimates against what really happens on this machine: the saved-tensor hooks, and what model and optimizer hold."""

import pytest
import torch

import pefttutor
from pefttutor import memory
from pefttutor.losses import causal_lm_loss
from pefttutor.memory.measured import watch_saved

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


def config_of(kind, attention="eager", dropout=0.0):
    import transformers as hf

    size = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 8}
    text = {"vocab_size": 500, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    both = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    llama = {**size, **text, "num_key_value_heads": 4, "attention_dropout": dropout}
    gpt2 = {"n_embd": 96, "n_layer": 3, "n_head": 8, "n_positions": 128, "attn_pdrop": dropout}
    t5 = {"d_model": 96, "d_kv": 10, "d_ff": 160, "num_layers": 3, "num_heads": 8, "dropout_rate": dropout}
    config = {
        "llama": lambda: hf.LlamaConfig(**llama),
        "qwen3": lambda: hf.Qwen3Config(**llama, head_dim=16),
        "gpt2": lambda: hf.GPT2Config(**text, **gpt2, resid_pdrop=dropout, embd_pdrop=dropout),
        "bloom": lambda: hf.BloomConfig(
            **text, hidden_size=96, n_layer=3, n_head=8, hidden_dropout=dropout, attention_dropout=dropout
        ),
        "bert": lambda: hf.BertConfig(**size, **text, **both),
        "t5": lambda: hf.T5Config(**text, **t5, feed_forward_proj="gated-gelu", decoder_start_token_id=0),
        "vit": lambda: hf.ViTConfig(**size, **both, image_size=64, patch_size=8, num_labels=5),
    }[kind]()
    config._attn_implementation = attention
    return config


def model_of(kind, attention="eager", dropout=0.0, dtype=torch.float32):
    import transformers as hf

    classes = {
        "llama": hf.LlamaForCausalLM, "qwen3": hf.Qwen3ForCausalLM, "gpt2": hf.GPT2LMHeadModel,
        "bloom": hf.BloomForCausalLM, "bert": hf.BertForSequenceClassification,
        "t5": hf.T5ForConditionalGeneration, "vit": hf.ViTForImageClassification,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return classes[kind]._from_config(config_of(kind, attention, dropout), dtype=dtype).train()


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
        model.activation_checkpointing_enable({"use_reentrant": True})
    with watch_saved(model.train()) as saved:
        model(**batch_of(kind, batch_size, length, dtype)).loss.backward()
    return estimated, saved, model


GRID = [
    (kind, how, attention, checkpointing)
    for kind in KINDS
    for how in ("full", "query and value", "every")
    for attention in ("eager", "sdpa")
    for checkpointing in (False, True)
    if (kind, attention) != ("bloom", "sdpa")
]


@pytest.mark.parametrize(("kind", "how", "attention", "checkpointing"), GRID)
def test_activations_within_ten_percent(kind, how, attention, checkpointing):
    case = {"checkpointing": checkpointing, "attention": attention}
    for size in ({"batch_size": 2, "length": 24}, {"batch_size": 3, "length": 40}):
        estimated, saved, _ = estimated_and_measured(kind, how, **case, **size)
        assert sum(estimated.activations.values()) == pytest.approx(saved.peak_bytes, rel=0.05)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "qwen3"])
@pytest.mark.parametrize("how", ["full", "every, dropout"])
def test_dropout_and_sixteen_bits(kind, how):
    estimated, saved, _ = estimated_and_measured(kind, how, dropout=0.1)
    assert estimated.activations["dropout"] > 0
    assert sum(estimated.activations.values()) == pytest.approx(saved.peak_bytes, rel=0.05)
    estimated, saved, _ = estimated_and_measured(kind, how, dtype=torch.bfloat16)
    assert sum(estimated.activations.values()) == pytest.approx(saved.peak_bytes, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["full", "every"])
def test_weights_gradients_and_optimizer_to_the_byte(kind, how):
    estimated, _, model = estimated_and_measured(kind, how)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer.step()
    state = [t for entry in optimizer.state.values() for t in entry.values() if t.dim()]
    adapters = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
    assert estimated.adapter_weights == adapters
    assert estimated.weights == sum(p.nbytes for p in model.parameters()) - adapters
    assert estimated.trained == sum(pefttutor.trainable(model).values())
    assert estimated.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert estimated.optimizer == sum(t.nbytes for t in state)


@pytest.mark.parametrize("how", ["full", "every"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_lean_loss(kind, how, monkeypatch):
    """`causal_lm_loss` brings hooks of its own, which ours must go through to be seen."""
    from pefttutor.kernels import recompute

    model = model_of(kind)
    method = None if how == "full" else method_of(kind, how)
    estimated = memory.estimate(
        model, method, batch_size=2, sequence_length=24, attention="eager", loss=causal_lm_loss, device="cpu"
    )
    if method:
        method.attach(model)
    with watch_saved(model.train()) as saved:
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)

        def both():
            kept = torch.autograd.graph.saved_tensors_hooks
            return kept(
                lambda t: p if not isinstance(p := recompute._pack(t), torch.Tensor) else outer[0](p),
                lambda p: (
                    outer[1](p)
                    if hasattr(p, "tensor") or isinstance(p, torch.Tensor)
                    else recompute._unpack(p)
                ),
            )

        monkeypatch.setattr("pefttutor.losses.recompute_activations", both)
        causal_lm_loss(model, batch_of(kind, 2, 24)).backward()
    assert sum(estimated.activations.values()) == pytest.approx(saved.peak_bytes, rel=0.05)


class Bottleneck(torch.nn.Module):
    """A layer that the estimator has never heard of."""

    def __init__(self, layer):
        super().__init__()
        out, device = layer.weight.shape[0], layer.weight.device
        self.layer = layer
        self.down, self.up = torch.nn.Linear(out, 5, device=device), torch.nn.Linear(5, out, device=device)

    def forward(self, x):
        y = self.layer(x)
        return y + self.up(torch.relu(self.down(y)))


class Adapter:
    """A method that states nothing about its memory."""

    def attach(self, model):
        pefttutor.freeze(model)
        for layer in model.model.layers:
            layer.mlp.down_proj = Bottleneck(layer.mlp.down_proj)
        return model


def test_a_method_that_states_nothing_is_counted_all_the_same():
    model, method = model_of("llama"), Adapter()
    estimated = memory.estimate(
        model, method, batch_size=2, sequence_length=24, attention="eager", device="cpu"
    )
    method.attach(model)
    with watch_saved(model.train()) as saved:
        model(**batch_of("llama", 2, 24)).loss.backward()
    trained = sum(pefttutor.trainable(model).values())
    assert trained == 3 * (96 * 5 + 5 + 5 * 96 + 96)
    assert estimated.trained == trained
    assert estimated.adapter_weights == 4 * trained
    assert sum(estimated.activations.values()) == pytest.approx(saved.peak_bytes, rel=0.01)
    assert all(p.device.type == "cpu" for p in model.parameters())


class Half(Adapter):
    """A method that keeps gradients and moments of some values only, and says so."""

    def memory(self, model):
        trained = sum(pefttutor.trainable(model).values())
        return {"gradients": trained // 2, "optimizer": trained // 4}


def test_a_method_can_state_that_it_keeps_fewer():
    stated, plain = (memory.estimate(config_of("llama"), method) for method in (Half(), Adapter()))
    assert stated.gradients == 4 * (plain.trained // 2)
    assert stated.optimizer == 2 * 4 * (plain.trained // 4)
    assert stated.weights == plain.weights


@pytest.mark.parametrize("name", ["BitFit", "LastLayers", "LayerNormTuning", "LinearProbe"])
def test_methods_that_train_whole_tensors_need_no_word_in_the_estimator(name):
    model, method = model_of("bert"), getattr(pefttutor, name)()
    estimated = memory.estimate(
        model, method, batch_size=2, sequence_length=24, attention="eager", device="cpu"
    )
    method.attach(model)
    with watch_saved(model.train()) as saved:
        model(**batch_of("bert", 2, 24)).loss.backward()
    assert estimated.trained == sum(pefttutor.trainable(model).values())
    assert sum(estimated.activations.values()) == pytest.approx(saved.peak_bytes, rel=0.01)


def test_a_method_that_looks_at_values_is_estimated_after_attaching():
    model, method = model_of("bert"), pefttutor.PaFi(fraction=0.01)
    with pytest.raises(
        ValueError, match=r"PaFi needs the model's values.*estimate\(method.attach\(model\)\)"
    ):
        memory.estimate(config_of("bert"), method)
    method.attach(model)
    estimated = memory.estimate(model, batch_size=2, sequence_length=24, attention="eager", device="cpu")
    with watch_saved(model.train()) as saved:
        model(**batch_of("bert", 2, 24)).loss.backward()
    assert estimated.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert sum(estimated.activations.values()) == pytest.approx(saved.peak_bytes, rel=0.05)
