"""The loss without logits is the model's own loss, on every kind of decoder it accepts."""

import pytest
import torch
import transformers

from pefttutor.train.losses import causal_lm_loss

LLAMA = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def model_of(kind):
    torch.manual_seed(0)
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)


def batch_of():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (3, 7), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, :2] = -100  # the prompt
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loss_and_every_gradient_are_the_models_own(kind):
    model, batch = model_of(kind), batch_of()
    results = []
    for loss in (model(**batch).loss, causal_lm_loss(model, batch)):
        model.zero_grad()
        loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters()} | {"loss": loss.detach()})
    wanted, ours = results
    for name in wanted:
        torch.testing.assert_close(ours[name], wanted[name], msg=lambda text, name=name: f"{name}: {text}")


def test_the_batch_is_left_as_it_was():
    batch = batch_of()
    causal_lm_loss(model_of("llama"), batch)
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]


def test_models_with_another_kind_of_head_are_refused():
    bert = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    )
    gemma = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=30.0)
    )
    for model in (bert, gemma, torch.nn.Linear(3, 3)):
        with pytest.raises(TypeError, match=f"{type(model).__name__}.*leave `loss` out"):
            causal_lm_loss(model, batch_of())


def test_a_batch_without_labels_is_refused():
    with pytest.raises(ValueError, match="expected 'labels'"):
        causal_lm_loss(model_of("llama"), {"input_ids": torch.zeros(1, 2, dtype=torch.int64)})
