"""The estimate's own arithmetic, what it leaves alone, and what it refuses."""

import copy

import pytest
import torch
import transformers as hf

import pefttutor
from pefttutor.memory import Breakdown, compare, estimate, measure
from tests.memory.models import ADAPTED, LORA, TEXT, N, llama
from tests.tiny import tiny_batch, tiny_model


def test_by_hand_for_full_fine_tuning_and_lora():
    """16 N bytes, and 4 N + 16 times what LoRA trains."""
    full, adapted = estimate(llama(), sequence_length=32), estimate(llama(), LORA, sequence_length=32)
    assert (full.weights, full.gradients, full.optimizer) == (4 * N, 4 * N, 8 * N)
    assert (adapted.weights, adapted.adapter_weights) == (4 * N, 4 * ADAPTED)
    assert (adapted.gradients, adapted.optimizer) == (4 * ADAPTED, 8 * ADAPTED)
    assert (full.values, adapted.values, adapted.trained) == (N, N + ADAPTED, ADAPTED)
    assert adapted.total == sum(adapted.as_dict().values())
    assert "total" in str(adapted)


def test_activations_of_one_linear_layer_by_hand():
    """In Llama's last block LoRA on the down projection keeps its input and x Aᵀ; below it nothing trains."""
    method = pefttutor.LoRA(r=4, target_modules=r"model\.layers\.1\.mlp\.down_proj")
    found = estimate(llama(), method, batch_size=3, sequence_length=10, attention="eager").activations
    tokens = 3 * 10
    assert found["ffn"] == 4 * tokens * (160 + 4)
    assert found["attention"] == found["embeddings"] == found["dropout"] == 0
    assert found["norms"] == 4 * tokens * (64 + 1)  # the last norm's input, and its root
    assert found["logits and loss"] == 4 * tokens * 300 + 8 * tokens + 4


def test_dtypes():
    half = estimate(llama(), LORA, weight_dtype="bfloat16", sequence_length=32)
    assert (half.weights, half.adapter_weights) == (2 * N, 4 * ADAPTED)  # ours keeps the factors in float32
    assert (
        estimate(llama(), LORA, weight_dtype=torch.bfloat16, adapter_dtype="bfloat16").gradients
        == 2 * ADAPTED
    )
    full = estimate(llama(), weight_dtype="float16", gradient_dtype="float32", optimizer_dtype="float32")
    assert (full.weights, full.gradients, full.optimizer) == (2 * N, 4 * N, 8 * N)
    mixed = estimate(llama(), weight_dtype="float16", optimizer_dtype="float32", master_weights=True)
    assert mixed.weights + mixed.gradients + mixed.optimizer == 16 * N
    assert estimate(llama(), optimizer="sgd").optimizer == 0
    assert estimate(llama(), optimizer="momentum").optimizer == 4 * N


def test_quantised_layers_are_those_in_the_blocks():
    inside = 2 * (4 * 64 * 64 + 3 * 64 * 160)
    found = estimate(llama(), LORA, weight_dtype="bfloat16", quantization="nf4")
    assert found.quantized_weights == inside * 4.5 / 8
    assert found.weights == 2 * (N - inside)
    double = estimate(llama(), LORA, quantization="nf4-double").quantized_weights
    assert double == pytest.approx(
        inside * 4.127 / 8, rel=1e-4
    )  # QLoRA, section 3: 0.373 bits fewer than 4.5
    with pytest.raises(ValueError, match="a quantised weight can't"):
        estimate(llama(), quantization="int8")


def test_checkpointing_keeps_the_input_of_each_layer_and_one_layer_at_a_time():
    deep = llama(num_hidden_layers=40)
    plain, saved = (
        estimate(deep, sequence_length=128, gradient_checkpointing=on).activations for on in (False, True)
    )
    assert saved["layer inputs"] > 0
    assert plain["layer inputs"] == 0
    assert sum(saved.values()) < sum(plain.values()) / 10


def test_the_model_is_left_alone_whether_adapted_or_not():
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    first = estimate(model, LORA, sequence_length=9, batch_size=3)
    assert pefttutor.adapted(model) is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    LORA.attach(model)
    assert estimate(model, sequence_length=9, batch_size=3) == first


def test_a_tied_weight_counts_once():
    config = hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300, **TEXT)
    model = hf.GPT2LMHeadModel(config)
    assert estimate(config).values == sum(p.numel() for p in model.parameters())
    assert estimate(model).weights == estimate(config).weights


def test_three_copies_of_the_logits_are_the_peak_of_a_step_with_many_words():
    config = hf.LlamaConfig(
        vocab_size=8000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        pad_token_id=0,
    )  # fmt: skip
    model = LORA.attach(hf.LlamaForCausalLM(config)).train()
    ids = torch.randint(3, 8000, (2, 64), generator=torch.Generator().manual_seed(0))
    measured = measure(lambda: model(input_ids=ids, labels=ids).loss.backward())
    needed = {
        copies: estimate(
            model, batch_size=2, sequence_length=64, logits_copies=copies, device="cpu"
        ).activations
        for copies in (1, 3)
    }
    assert sum(needed[3].values()) == pytest.approx(measured.allocator_peak, rel=0.1)
    assert sum(needed[1].values()) < 0.6 * measured.allocator_peak


def test_compare_says_both_and_their_ratio():
    model, batch = tiny_model("llama"), tiny_batch("llama")
    LORA.attach(model).train()
    estimated = estimate(model, batch_size=3, sequence_length=9, padding=True, device="cpu")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(**batch).loss.backward()
    optimizer.step()
    measured = measure(lambda: model(**batch).loss.backward(), model=model, optimizer=optimizer)
    rows = compare(estimated, measured)
    assert list(rows) == ["weights", "gradients", "optimizer", "activations"]
    assert [rows[part].ratio for part in ("weights", "gradients", "optimizer")] == [1, 1, 1]
    assert rows["activations"].ratio == pytest.approx(1, abs=0.01)
    assert measured.allocator_peak > measured.activations
    assert "model.layers.0.self_attn.q_proj" in measured.by_layer
    assert sum(measured.by_layer.values()) == measured.activations
    with pytest.raises(ValueError, match=r"measure\(step, model=model"):
        compare(estimated, measure(lambda: None))


def test_a_ratio_of_nothing_is_one():
    nothing = Breakdown()
    assert nothing.total == 0
