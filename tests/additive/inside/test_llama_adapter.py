"""LLaMA-Adapter against HF PEFT's adaption prompts: outputs and every gradient; and the authors' gates by hand."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from pefttutor import (
    IA3,
    AdapterBias,
    DoRA,
    LLaMAAdapter,
    LoRA,
    PrefixTuning,
    VeRA,
    detach,
    memory,
    merge,
    switch,
    trainable,
)
from tests.cases import answer, gradients, moved
from tests.memory.models import batch_of as batch_for_memory
from tests.memory.models import held
from tests.memory.models import model_of as model_for_memory
from tests.pictures import differences, picture, tensors
from tests.tiny import checkpointed, made, tiny_batch, tiny_model

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-11}
NEAR = {
    "rtol": 1e-5,
    "atol": 5e-6,
}  # HF PEFT takes the prompts' softmax in float32, also in a model of float64
P = 5


def model_of(kind: str, *, heads: int = 4, layers: int = 3) -> Any:
    """Without a bias in W_o, which HF PEFT adds twice. Mistral sees four tokens back; `heads` share two of keys."""
    if kind == "mistral":
        sizes = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": layers}
        config = hf.MistralConfig(**sizes, num_attention_heads=heads, num_key_value_heads=2, sliding_window=4)
        return made(hf.MistralForCausalLM, config, spread=True).to(F64)
    own = {"attention_bias": False, "num_key_value_heads": 2}
    return tiny_model(kind, dtype=F64, layers=layers, heads=heads, **own)


def peers(kind: str, adapter_layers: int, **how: Any) -> tuple[Any, Any, dict[str, str]]:
    """Ours and HF PEFT's with the same prompts and gates, which aren't 0; the base gets gradients, too."""
    ours = moved(LLaMAAdapter(adapter_len=P, adapter_layers=adapter_layers).attach(model_of(kind, **how)))
    config = peft.AdaptionPromptConfig(adapter_len=P, adapter_layers=adapter_layers, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(model_of(kind, **how), config).eval()
    names = {}
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            names[name] = name.removeprefix("base_model.model.").replace(".adaption", ".o_proj.adaption")
            p.data.copy_(ours.get_parameter(names[name]).view_as(p))
    assert set(names.values()) == set(trainable(ours))
    for p in (*ours.parameters(), *theirs.parameters()):
        p.requires_grad_(True)
    return ours, theirs, names


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("kind", "adapter_layers", "heads"), [("llama", 3, 4), ("llama", 1, 2), ("mistral", 2, 4)]
)
def test_outputs_and_every_gradient_are_those_of_hf_peft(kind, adapter_layers, heads, side):
    (ours, theirs, names), batch = peers(kind, adapter_layers, heads=heads), tiny_batch("llama", side=side)
    gates = [p for name, p in ours.named_parameters() if name.endswith("gate")]
    assert len(gates) == adapter_layers and all(p.abs().min() > 1e-3 for p in gates)  # noqa: PT018
    mine, other = ours(**batch), theirs(**batch)
    torch.testing.assert_close(mine.logits, other.logits, **NEAR)
    assert (mine.logits - model_of(kind, heads=heads)(**batch).logits).abs().max() > 0.01
    found, expected = gradients(ours, mine.loss), {}
    for name, g in gradients(theirs, other.loss).items():
        own = names.get(
            name, name.removeprefix("base_model.model.").replace("self_attn.model.", "self_attn.")
        )
        expected[own] = g.view_as(ours.get_parameter(own))
    assert found.keys() == expected.keys()
    for name, g in found.items():
        torch.testing.assert_close(g, expected[name], **NEAR, msg=name)
        assert "adaption" not in name or g.abs().max() > 1e-8, (
            f"{name}: a gradient of zero would prove nothing"
        )


@pytest.mark.parametrize("gate", ["layer", "head"])
def test_the_formula_head_by_head(gate):
    """The authors give each head a gate of its own, and take its tanh; with W_o's bias, which is added once."""
    base, batch = tiny_model("llama", dtype=F64), tiny_batch("llama")
    ours = moved(LLaMAAdapter(adapter_len=P, gate=gate).attach(tiny_model("llama", dtype=F64)))
    assert ours.model.layers[0].self_attn.o_proj.bias is not None
    leaves = {n: p.detach().clone().requires_grad_() for n, p in ours.named_parameters() if p.requires_grad}
    gates = {"layer": 1, "head": 4}[gate]
    assert [leaf.numel() for name, leaf in leaves.items() if name.endswith("gate")] == [gates] * 2

    def attend(i: int, attention: Any, args: Any, kwargs: Any) -> None:
        prompt, g = (leaves[f"model.layers.{i}.self_attn.o_proj.adaption_{x}"] for x in ("prompt", "gate"))
        h, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        q, K, V = attention.q_proj(h), attention.k_proj(prompt), attention.v_proj(prompt)
        more = torch.zeros_like(q)
        for head in range(4):
            own, shared = slice(6 * head, 6 * head + 6), slice(6 * (head // 2), 6 * (head // 2) + 6)
            angles = torch.complex(cos, sin)[..., :3]
            turned = torch.complex(q[..., own][..., :3], q[..., own][..., 3:]) * angles
            seen = torch.cat([turned.real, turned.imag], -1) @ K[:, shared].t() / math.sqrt(6)
            weight = g[head].tanh() if gate == "head" else g[0]
            more[..., own] = weight * seen.softmax(-1) @ V[:, shared]
        once = attention.o_proj.register_forward_pre_hook(lambda layer, x: (once.remove(), (x[0] + more,))[1])

    for i, layer in enumerate(base.model.layers):
        layer.self_attn.register_forward_pre_hook(lambda *call, i=i: attend(i, *call), with_kwargs=True)
    expected, found = base(**batch), ours(**batch)
    torch.testing.assert_close(found.logits, expected.logits, **EXACT)
    right = dict(zip(leaves, torch.autograd.grad(expected.loss, list(leaves.values())), strict=True))
    mine = gradients(ours, found.loss)
    assert mine.keys() == right.keys()
    for name, g in mine.items():
        assert g.abs().max() > 1e-8
        torch.testing.assert_close(g, right[name], **EXACT, msg=name)


def test_at_the_start_the_gate_alone_gets_a_gradient():
    model = LLaMAAdapter(adapter_len=P).attach(tiny_model("llama"))
    found = gradients(model, model(**tiny_batch("llama")).loss)
    assert {name.rpartition("_")[2]: bool(g.any()) for name, g in found.items()} == {
        "prompt": False,
        "gate": True,
    }
    prompts = torch.cat([p.flatten() for n, p in model.named_parameters() if n.endswith("adaption_prompt")])
    assert prompts.std().item() == pytest.approx(1, rel=0.15)


def test_a_seed_fixes_the_start_and_another_one_gives_another():
    one, same, other = (
        tensors(LLaMAAdapter(adapter_len=P, init_seed=i).attach(tiny_model("llama"))) for i in (1, 1, 2)
    )
    assert differences(one, same) == []
    assert {name.rpartition(".")[2] for name in differences(one, other)} == {"adaption_prompt"}


def test_the_published_count():
    """Zhang et al. 2023: 1.2 M for LLaMA-7B: 30 layers of 32, 10 prompts, and a gate for each of 32 heads."""
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(hf.LlamaConfig())
    assert LLaMAAdapter(adapter_layers=30, gate="head").count(model) == 30 * 10 * 4096 + 30 * 32 == 1_229_760
    assert LLaMAAdapter(adapter_layers=30).count(model) == 30 * (10 * 4096 + 1)


def test_only_the_upper_layers_get_prompts():
    model = LLaMAAdapter(adapter_len=P, adapter_layers=1).attach(tiny_model("llama", layers=3))
    assert {name.split(".")[2] for name in trainable(model)} == {"2"}


# ---- beside others


def test_two_stand_side_by_side_and_add_up():
    """Both read the same queries; what they add in one layer is a sum."""
    model, batch, said = tiny_model("llama", layers=1, dtype=F64), tiny_batch("llama"), {}
    states: dict[str, Tensor] = {}
    for seed, name in enumerate("ab"):
        LLaMAAdapter(adapter_len=P).attach(model, name=name)
        moved(switch(model, name), seed)
    layer = nn.Module.__getattr__(model.model.layers[0].self_attn, "o_proj")
    layer.register_forward_hook(lambda layer, args, output: states.__setitem__("now", output))
    for names in ((), ("a",), ("b",), ("a", "b")):
        answer(switch(model, *names), batch)
        said[names] = states["now"]
    both = said["a",] + said["b",] - said[()]
    torch.testing.assert_close(said["a", "b"], both, **EXACT)
    assert (said["a",] - said[()]).abs().max() > 1e-3


def test_prompts_pass_what_another_method_has_made_of_w_k_and_w_v():
    """Of a LoRA there: when it has been folded into the weights, all is as before."""
    model = LoRA(r=2, target_modules=("q_proj", "k_proj", "v_proj")).attach(tiny_model("llama"))
    moved(LLaMAAdapter(adapter_len=P).attach(model, name="prompts"))
    said, without = (
        answer(switch(model, *names), tiny_batch("llama")) for names in (("default", "prompts"), ("prompts",))
    )
    assert (said - without).abs().max() > 0.1
    switch(model, "default", "prompts")
    detach(model, "default", keep=True)
    torch.testing.assert_close(answer(model, tiny_batch("llama")), said, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        LoRA(r=2, target_modules=("o_proj",)),
        DoRA(r=2, target_modules=("o_proj",)),
        VeRA(r=4, target_modules=("o_proj",)),
        IA3(target_modules=("o_proj",), feedforward_modules=("o_proj",)),
        AdapterBias(target_modules=("o_proj",)),
    ],
    ids=lambda other: type(other).__name__,
)
def test_whatever_else_changes_w_o_reads_what_the_prompts_give_too(other):
    """Attached before or after, beside the weight or in it, all the same."""
    said, batch, prompts = [], tiny_batch("llama"), LLaMAAdapter(adapter_len=P)
    for first, second in (("prompts", "other"), ("other", "prompts")):
        model, made = tiny_model("llama", dtype=F64), {"prompts": prompts, "other": other}
        for name in (first, second):
            made[name].attach(model, name=name)
        for seed, name in enumerate(made):
            moved(switch(model, name), seed)
        said.append(answer(switch(model, *made), batch))
        if first == "prompts":
            alone = answer(switch(model, "other"), batch)
            assert (alone - said[0]).abs().max() > 0.1
            switch(model, *made)
        said.append(answer(merge(model, "other"), batch))
        detach(model, "other", keep=True)
        said.append(answer(model, batch))
    for found in said[1:]:
        torch.testing.assert_close(found, said[0], **EXACT)


def test_it_stands_beside_a_prefix_whichever_came_first():
    """A prefix's keys and values aren't the attention's own, and the trial asks for these."""
    said, batch = [], tiny_batch("llama", side="left")
    made = {"prompts": LLaMAAdapter(adapter_len=P), "prefix": PrefixTuning(num_virtual_tokens=2)}
    for names in (("prompts", "prefix"), ("prefix", "prompts")):
        model = tiny_model("llama", dtype=F64)
        for name in names:
            made[name].attach(model, name=name)
        assert made["prompts"].count(model) == 2 * (P * 24 + 1)
        for seed, name in enumerate(made):
            moved(switch(model, name), seed)
        said.append(answer(switch(model, *made), batch))
        alone = [answer(switch(model, name), batch) for name in made]
        assert all((one - said[0]).abs().max() > 0.1 for one in alone)
    torch.testing.assert_close(said[1], said[0], **EXACT)


def test_a_layer_called_without_its_attention_says_so():
    model = LLaMAAdapter(adapter_len=P).attach(tiny_model("llama"))
    with pytest.raises(RuntimeError, match="o_proj was called without its attention"):
        model.model.layers[0].self_attn.o_proj(torch.ones(1, 2, 24))


# ---- memory, and refusals


@pytest.mark.parametrize(
    ("kind", "attention", "checkpointing", "dtype"),
    [
        ("llama", "eager", False, torch.float32),
        ("llama", "sdpa", True, torch.float32),
        ("llama", "sdpa", False, torch.bfloat16),
        ("qwen3", "sdpa", False, torch.float32),
    ],
)
def test_what_a_step_keeps_for_it_is_estimated(kind, attention, checkpointing, dtype):
    model = model_for_memory(kind, dtype=dtype, attention=attention)
    method = LLaMAAdapter(adapter_layers=2)
    options = {"batch_size": 2, "sequence_length": 24, "attention": attention, "device": "cpu"}
    estimated = memory.estimate(model, method, **options, gradient_checkpointing=checkpointing)
    method.attach(model)
    if checkpointing:
        checkpointed(model, reentrant=True)
    assert estimated.trained == sum(trainable(model).values()) == method.count(model)
    measured = held(model, batch_for_memory(kind, 2, 24, dtype))
    assert sum(estimated.activations.values()) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_bias_for_each_distance_is_another_form_also_while_it_is_zero(device):
    model = tiny_model("llama").to(device)
    model.model.layers[1].self_attn.distances = nn.Parameter(torch.zeros(3, device=device))
    with pytest.raises(
        ValueError, match=r"layers.1.self_attn' of .* else \(it has a parameter 'distances'\)"
    ):
        LLaMAAdapter().count(model)


class Backwards(nn.Module):
    """A rotation by the other direction."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        cos, sin = self.inner(*args, **kwargs)
        return cos, -sin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attention_that_computes_something_else_is_refused(dtype):
    """Cohere turns neighbouring features, Llama those that are half a head apart."""
    sizes = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    config = hf.CohereConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    model = made(hf.CohereForCausalLM, config, spread=True).to(dtype)
    before = picture(model)
    for act in (LLaMAAdapter().attach, LLaMAAdapter().count):
        with pytest.raises(
            ValueError, match=r"'model.layers.0.self_attn' of this Cohere\w+ computes something else"
        ):
            act(model)
    assert differences(before, picture(model)) == []
    turned = tiny_model("llama", dtype=dtype)
    turned.model.rotary_emb = Backwards(turned.model.rotary_emb)
    LLaMAAdapter().attach(turned)  # by whatever angles: they are the model's own


def test_a_bound_that_no_value_reaches_now_is_another_form_too():
    """OLMo's clip_qkv: the prompts' keys and values would pass it by."""
    sizes = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    for bound in (None, 8.0):
        config = hf.OlmoConfig(**sizes, num_attention_heads=4, clip_qkv=bound)
        model = made(hf.OlmoForCausalLM, config, spread=True)
        if bound is None:
            LLaMAAdapter().attach(model)
        else:
            with pytest.raises(
                ValueError, match=r"'model.layers.0.self_attn' of this Olmo\w+ computes somet"
            ):
                LLaMAAdapter().attach(model)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"adapter_layers": 3},
            "adapter_layers is 3, and this model has 2 layers with such an attention: give at",
        ),
        ({"adapter_len": 0}, "adapter_len is 0; it must be a whole number ≥ 1"),
        ({"adapter_layers": 0}, "adapter_layers is 0; it must be a whole number ≥ 1"),
        ({"gate": "token"}, "gate is 'token'; it must be one of 'layer', 'head'"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is a string"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(settings, says):
    model = tiny_model("llama")
    before = picture(model)
    with pytest.raises(ValueError, match=says):
        LLaMAAdapter(**settings).attach(model)
    assert differences(before, picture(model)) == []
