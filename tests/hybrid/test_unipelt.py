"""UniPELT against the library `adapters` (stored results), against its parts with gates by hand, and by its count."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from pefttutor import (
    Adapter,
    AdapterFusion,
    DoRA,
    LoRA,
    PrefixTuning,
    PromptTuning,
    UniPELT,
    load,
    memory,
    save,
    switch,
    trainable,
)
from tests.additive.inside.adapters_library import BOTTLENECK, FILE, IDS, PREFIX, model_of, value_of
from tests.cases import answer, base_answer, batch_of, fresh, gradients, loss_of, moved
from tests.memory.models import batch_of as batch_for_memory
from tests.memory.models import held
from tests.memory.models import model_of as model_for_memory
from tests.pictures import differences, picture, tensors
from tests.tiny import tiny_batch, tiny_model

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-11}
BERT = {"lora_modules": ("query", "value")}

# ---- the library


def our_name(theirs: str) -> str:
    """A parameter's name here, by the library's, which has the prefix's in its first layer."""
    if ".self_prefix." in theirs:
        key = theirs.partition(".self_prefix.")[2].replace("wte.weight", "table")
        return f"prefix_{key.removeprefix('control_trans.').replace('.', '_')}"
    for inside, ours in {
        ".prefix_tuning.prefix_gates.a.": ".prefix_gate_",
        ".loras.a.gate.": ".lora_gate_",
    }.items():
        theirs = theirs.replace(inside, ours)
    host, inside, key = theirs.replace(".loras.a.", ".").partition(".adapters.a.")
    key = key.replace("down.0.", "down.").replace("gate.", "adapter_gate_").replace(".weight", "")
    return f"{host}.dense.{key.replace('.', '_')}" if inside else host


def test_outputs_and_every_gradient_are_those_of_the_library():
    """A text without padding, numbered from −P on, since there a prefix doesn't move positions on."""
    stored, model = load_file(FILE), model_of("bert")
    for name, p in model.named_parameters():
        p.data.copy_(stored[f"bert/{name}"])
    sizes = {"num_virtual_tokens": PREFIX, "encoder_hidden_size": 5, "bottleneck": BOTTLENECK, "r": 2}
    UniPELT(prefix_projection=True, activation="gelu", **sizes, **BERT).attach(model)
    start = "bert-unipelt/"
    found = {name.removeprefix(start): t for name, t in stored.items() if name.startswith(start)}
    theirs = {our_name(n.removeprefix("value/")): t for n, t in found.items() if n.startswith("value/")}
    assert set(trainable(model)) == set(theirs)
    for name, value in theirs.items():
        p = model.get_parameter(name)
        p.data.copy_(value.view_as(p))
    places = torch.arange(IDS.shape[1]).expand_as(IDS) - PREFIX
    hidden, value = value_of(model, torch.ones_like(IDS), position_ids=places)
    torch.testing.assert_close(hidden, found["hidden"], **EXACT)
    expected = {our_name(n.removeprefix("grad/")): t for n, t in found.items() if n.startswith("grad/")}
    ours = gradients(model, value)
    assert set(ours) == set(expected) == set(theirs)
    for name, grad in ours.items():
        assert grad.abs().max() > 1e-6, f"{name}: a gradient of zero would prove nothing"
        torch.testing.assert_close(grad, expected[name].view_as(grad), **EXACT, msg=name)


# ---- its parts


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_with_open_gates_it_is_its_parts_side_by_side(kind):
    """b = 40 opens a gate, to the last bit: σ(40) is 1 in float64 but for 4e-18."""
    lora = {"llama": ("q_proj",), "gpt2": ("c_attn",), "bert": ("query",), "t5": ("q",)}[kind]
    prefix, adapter = 3 * (kind == "bert"), {"bottleneck": 5, "activation": "tanh"}
    method = UniPELT(
        num_virtual_tokens=prefix,
        gate="text" if prefix else "token",
        r=2,
        lora_modules=lora,
        **adapter,
    )
    ours = moved(method.attach(tiny_model(kind, dtype=F64)))
    for name, p in ours.named_parameters():
        if "_gate_" in name:
            p.data.fill_(40.0 if name.endswith("bias") else 0.0)
    others = tiny_model(kind, dtype=F64)
    if prefix:
        others = PrefixTuning(num_virtual_tokens=3).attach(others, name="prefix")
    others = Adapter(placement="pfeiffer", **adapter).attach(others, name="after")
    others = LoRA(r=2, lora_alpha=2, target_modules=lora).attach(others, name="lora")
    for name in trainable(others):
        others.get_parameter(name).data.copy_(ours.get_parameter(name.partition("@")[0]))
    inputs = tiny_batch(kind, side="left", dtype=F64)
    torch.testing.assert_close(answer(ours, inputs), answer(others, inputs), **EXACT)
    found = gradients(ours, loss_of(ours, inputs))
    theirs = {n.partition("@")[0]: g for n, g in gradients(others, loss_of(others, inputs)).items()}
    assert theirs.keys() == {name for name in found if "_gate_" not in name}
    for name, grad in theirs.items():
        torch.testing.assert_close(found[name], grad, **EXACT, msg=name)


def test_closed_gates_give_the_base_and_a_prefix_without_keys_is_not_it():
    """σ(−800) is 0: without its prefix the model is the base; with it, keys of zeros take attention away."""
    for prefix in (0, 3):
        model = moved(UniPELT(num_virtual_tokens=prefix, bottleneck=4, r=2, **BERT).attach(fresh("bert")))
        for name, p in model.named_parameters():
            if "_gate_" in name:
                p.data.fill_(-800.0 if name.endswith("bias") else 0.0)
        distance = (answer(model, batch_of("bert")) - base_answer("bert")).abs().max()
        assert distance < 1e-6 if prefix == 0 else distance > 1e-3


def test_padding_is_no_part_of_the_mean():
    model = moved(UniPELT(num_virtual_tokens=3, bottleneck=4, r=2, **BERT).attach(fresh("bert")))
    batch = batch_of("bert")
    together = answer(model, batch)
    for i, mask in enumerate(batch["attention_mask"].bool()):
        row = {k: v[i : i + 1, mask] for k, v in batch.items() if k in ("input_ids", "token_type_ids")}
        torch.testing.assert_close(model(**row).logits[0], together[i], rtol=1e-4, atol=1e-5)


def test_a_gate_of_a_text_differs_from_text_to_text_and_one_of_a_token_from_token_to_token():
    for gate in ("text", "token"):
        model = UniPELT(num_virtual_tokens=0, gate=gate, bottleneck=4, r=2, **BERT).attach(fresh("bert"))
        change = vars(moved(model).bert.encoder.layer[0].attention.self.query)["_changes"]["default"]
        answer(model, batch_of("bert"))
        x = torch.randn(3, 5, 24)
        g = change.tokens.gate(x, *change.trained()[2:])
        assert g.shape == ((3, 1, 1) if gate == "text" else (3, 5, 1))
        assert g.unique().numel() == g.numel()


def test_virtual_tokens_of_another_attachment_have_gates_too():
    model = PromptTuning(num_virtual_tokens=2).attach(fresh("bert"), name="prompt")
    model = moved(UniPELT(num_virtual_tokens=0, bottleneck=4, r=2, **BERT).attach(model))
    batch = batch_of("bert")
    together = answer(model, batch)
    mask = batch["attention_mask"][1].bool()
    row = {k: v[1:2, mask] for k, v in batch.items() if k in ("input_ids", "token_type_ids")}
    torch.testing.assert_close(model(**row).logits[0], together[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(answer(switch(model), batch), base_answer("bert"))


# ---- counts, files, memory, refusals


def test_the_count_for_bert_base_is_that_of_the_authors_code():
    with torch.device("meta"):
        model = hf.BertModel(hf.BertConfig())
    places = {"adapter_modules": r".*\.\d+\.output\.dense", **BERT}
    adapter, lora, gates, prefix = 74_544, 24_576, 4 * 769, 184_320
    assert UniPELT(**places).count(model) == 12 * (adapter + lora + gates) + prefix == 1_410_672
    with torch.device("meta"):
        assert sum(trainable(memory.meta.with_method(UniPELT(**places), model)).values()) == 1_410_672


def test_without_its_mlp_it_says_what_it_said_and_is_saved_so(tmp_path):
    method = UniPELT(num_virtual_tokens=3, prefix_projection=True, bottleneck=4, r=2, **BERT)
    model = moved(method.attach(fresh("bert")))
    said = answer(model, batch_of("bert"))
    method.drop_projection(model)
    assert torch.equal(answer(model, batch_of("bert")), said)
    save(model, tmp_path)
    assert torch.equal(answer(load(fresh("bert"), tmp_path), batch_of("bert")), said)


def test_a_seed_fixes_the_start_and_another_one_gives_another():
    one, same, other = (
        tensors(UniPELT(num_virtual_tokens=2, bottleneck=4, r=2, init_seed=i, **BERT).attach(fresh("bert")))
        for i in (1, 1, 2)
    )
    assert differences(one, same) == []
    assert differences(one, other)


@pytest.mark.parametrize(
    ("kind", "prefix", "dtype"),
    [
        ("bert", 6, torch.float32),
        ("bert", 0, torch.bfloat16),
        ("llama", 0, torch.float32),
        ("gpt2", 0, torch.float32),
    ],
)
def test_what_a_step_keeps_for_it_is_estimated(kind, prefix, dtype):
    lora = {"bert": ("query", "value"), "llama": ("q_proj", "v_proj"), "gpt2": ("c_attn",)}[kind]
    gate = "text" if kind == "bert" else "token"
    method = UniPELT(num_virtual_tokens=prefix, gate=gate, bottleneck=16, r=4, lora_modules=lora)
    model = model_for_memory(kind, dtype=dtype)
    options = {"batch_size": 2, "sequence_length": 24, "attention": "eager"}
    estimated = memory.estimate(model, method, **options, device="cpu")
    method.attach(model)
    assert estimated.trained == sum(trainable(model).values()) == method.count(model)
    measured = held(model, batch_for_memory(kind, 2, 24, dtype))
    assert sum(estimated.activations.values()) == pytest.approx(measured, rel=0.02)


def test_what_builds_on_its_layers_is_refused():
    model = UniPELT(num_virtual_tokens=0, bottleneck=4, r=2, **BERT).attach(fresh("bert"), name="a")
    with pytest.raises(ValueError, match=r"'a' \(UniPELT\) has more than adapters"):
        AdapterFusion(adapters=("a",)).attach(model)
    with pytest.raises(ValueError, match="has the gated change 'a', which no weight can hold"):
        DoRA(r=2, target_modules=("query",)).attach(model, name="dora")


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        ("llama", {}, "a LlamaForCausalLM writes from left to right: it would see what comes later"),
        ("bert", {"gate": "token"}, "gate is 'token', and a prefix has the same keys for all tokens"),
        ("bert", {"gate": "row"}, "gate is 'row'; it must be one of 'text', 'token'"),
        ("bert", {"r": 25}, r"r is 25, but 'bert.*query' maps 24 to 24: it must be at most 24"),
        ("bert", {"lora_modules": ("word_embeddings",)}, "reads words, of which there is no gate"),
        ("bert", {"lora_modules": ("layer.0.output.dense",)}, "has the adapter already; name other layers"),
        ("bert", {"lora_modules": ("wrong",)}, "lora_modules: this model has no 'wrong'"),
        ("bert", {"adapter_modules": ("wrong",)}, "adapter_modules: this model has no 'wrong'"),
        (
            "vit",
            {"lora_modules": ("q_proj",)},
            "before a text's tokens, and a ViTForImageClassification has none",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(kind, fields, says):
    model = tiny_model(kind)
    before = picture(model)
    with pytest.raises(ValueError, match=says):
        UniPELT(**({"bottleneck": 4, "r": 2, **BERT} | fields)).attach(model)
    assert differences(before, picture(model)) == []
