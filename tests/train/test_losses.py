"""The loss without logits is the model's own loss, on every kind of decoder it accepts, whatever hangs on its head."""

import copy
import gc
import weakref

import pytest
import torch
import transformers
from torch import nn

from pefttutor import PASTA, DiffPruning, LoRA, Masking, SparseFineTuning
from pefttutor.train.losses import causal_lm_loss
from tests.data import unusual

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


def own_loss(model, batch):
    return model(**batch).loss


def check_same(model, batch, **tolerance):
    """The loss, and the gradient of everything that trains, against the model's own."""
    results = []
    for loss in (own_loss, causal_lm_loss):
        model.zero_grad()
        torch.manual_seed(1)  # of dropout, and of gates
        value = loss(model, batch)
        value.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append(grads | {"loss": value.detach()})
    wanted, ours = results
    for name in wanted:
        torch.testing.assert_close(
            ours[name], wanted[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loss_and_every_gradient_are_the_models_own(kind):
    check_same(model_of(kind), batch_of())


# ---- what hangs on the head


def sparse(model):
    chosen = torch.zeros(50, 16, dtype=torch.bool)
    chosen[::3, 1] = True
    name = "model.embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"
    return SparseFineTuning().attach(model, {name: chosen})


def with_hook(model):
    model.lm_head.register_forward_hook(lambda head, args, logits: 2 * logits)
    return model


def with_hook_before(model):
    model.lm_head.register_forward_pre_hook(lambda head, args: (2 * args[0],))
    return model


def with_hook_on_the_model(model):
    def doubled(model, args, output):
        output.loss = output.loss if output.loss is None else 2 * output.loss
        return output

    model.register_forward_hook(doubled)
    return model


def with_hook_behind(model):
    model.lm_head.register_full_backward_hook(lambda head, into, out: (3 * into[0],))
    return model


def with_weight_made_anew(model):
    nn.utils.parametrizations.weight_norm(model.lm_head)
    return model


def with_bias(model):
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 50))
    return model


def with_own_kind_of_head(model):
    class Halved(nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    model.lm_head.__class__ = Halved
    return model


def diff_pruning(model):
    DiffPruning().attach(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("_delta"):
                p.normal_(generator=torch.Generator().manual_seed(5)).mul_(0.1)
    return model


def masking(model):
    return Masking(target_modules=("lm_head",), init_sparsity=0.5).attach(model)


def lora(model):
    LoRA(r=2, target_modules=("lm_head", "q_proj"), lora_dropout=0.2).attach(model)
    with torch.no_grad():
        model.lm_head.lora_B.fill_(0.3)
    return model


CHANGES = {
    "sparse": sparse,
    "masking": masking,
    "diff-pruning": diff_pruning,
    "lora": lora,
    "a hook": with_hook,
    "a hook before": with_hook_before,
    "a hook on the model": with_hook_on_the_model,
    "a hook on gradients": with_hook_behind,
    "weight norm": with_weight_made_anew,
    "a bias": with_bias,
    "another class": with_own_kind_of_head,
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("asked_before", [False, True])
def test_what_hangs_on_the_head_counts(change, tied, asked_before):
    if tied and change == "weight norm":
        pytest.skip("a tied weight isn't made anew")
    model = unusual.decoder(tie_word_embeddings=tied)
    if asked_before:  # what was proved of the head as it was doesn't hold for what it becomes
        causal_lm_loss(model, batch_of())
    model = CHANGES[change](model).train()
    check_same(model, batch_of())


def test_hooks_of_the_model_run():
    """PASTA finds the special tokens of a batch in a hook before the model, not before its body."""
    model = unusual.decoder()
    PASTA(special_token_ids=(7, 8), num_special=2).attach(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("special"):
                p.fill_(0.5)
    other, batch = batch_of(), batch_of()
    batch["input_ids"][:, 2], other["input_ids"][:] = 7, 9
    model(**other)
    check_same(model, batch)


# ---- which models


@pytest.mark.parametrize(
    "make",
    [
        lambda: unusual.decoder("Mixtral", num_local_experts=4),
        lambda: unusual.decoder("Gemma2", final_logit_softcapping=None),
        lambda: unusual.decoder("Cohere", logit_scale=1.0),
        unusual.gemma_with_pictures,
        lambda: unusual.lively(
            transformers.BertLMHeadModel(
                transformers.BertConfig(**unusual.DECODER, is_decoder=True, hidden_dropout_prob=0.0)
            )
        ),
    ],
)
def test_other_models_with_this_loss(make):
    check_same(make(), batch_of())


@pytest.mark.parametrize(
    "make",
    [
        unusual.bart,
        unusual.xlm,
        unusual.smoothed,
        lambda: unusual.decoder("Mixtral", num_local_experts=4, output_router_logits=True),
        lambda: unusual.decoder("Gemma2", final_logit_softcapping=30.0),
        lambda: unusual.decoder("Cohere", logit_scale=0.5),
        lambda: unusual.decoder("Granite", logits_scaling=2.0),
        unusual.bamba,
    ],
)
def test_models_with_another_loss_are_refused_with_both_numbers(make):
    number = r"-?\d+(\.\d+)?"
    with pytest.raises(
        TypeError, match=rf"shifted cross-entropy is {number}, \w+ makes a loss of {number}\."
    ):
        causal_lm_loss(make(), batch_of())


def test_a_head_that_is_read_past_is_refused():
    class PastForCausalLM(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **more):
            logits = self.model(input_ids=input_ids, **more).last_hidden_state @ self.lm_head.weight.T
            loss = None if labels is None else self.loss_function(logits, labels, vocab_size=50)
            return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    with pytest.raises(TypeError, match=r"calls its head 0 times.*leave `loss` out"):
        causal_lm_loss(PastForCausalLM(transformers.LlamaConfig(**LLAMA)), batch_of())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = unusual.decoder().to(dtype)
    exact = {"rtol": 0.05, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
    exact["check_dtype"] = False  # transformers makes the loss in float32
    check_same(model, batch_of(), **exact)
    with pytest.raises(TypeError, match="leave `loss` out"):
        causal_lm_loss(
            unusual.decoder("Mixtral", num_local_experts=4, output_router_logits=True).to(dtype), batch_of()
        )


def test_settings_that_change_are_proved_again():
    model = unusual.decoder("Mixtral", num_local_experts=4)
    causal_lm_loss(model, batch_of())
    model.config.output_router_logits = True
    with pytest.raises(TypeError, match="leave `loss` out"):
        causal_lm_loss(model, batch_of())
    model.config.output_router_logits = False
    causal_lm_loss(model, batch_of())
    counted = batch_of() | {"num_items_in_batch": 5}  # then transformers divides by this number
    with pytest.raises(TypeError, match="leave `loss` out"):
        causal_lm_loss(model, counted)


def test_virtual_tokens_in_front():
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    check_same(peft.get_peft_model(unusual.decoder(), config), batch_of())


def test_the_proof_is_made_once_and_leaves_no_trace():
    model, calls = unusual.decoder(attention_dropout=0.1).train(), []
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(4)
    first = causal_lm_loss(model, batch_of())
    proof, state = len(calls) - 1, torch.get_rng_state()
    assert proof > 0
    torch.manual_seed(4)
    again = causal_lm_loss(model, batch_of())
    assert len(calls) == proof + 2
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert "forward" not in vars(model.lm_head)
    causal_lm_loss(copy.deepcopy(model), batch_of())
    gone = weakref.ref(model)
    del model, first, again
    gc.collect()
    assert gone() is None


def test_texts_of_a_few_tokens():
    model = unusual.decoder()
    for length in (2, 3, 4):
        check_same(
            model,
            {"input_ids": torch.arange(5, 5 + length)[None], "labels": torch.arange(5, 5 + length)[None]},
        )


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
