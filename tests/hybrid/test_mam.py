"""MAM against the library `adapters` (stored results), against its two halves side by side, and its published count."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from pefttutor import MAM, Adapter, PrefixTuning, load, memory, save, trainable
from tests.additive.inside.adapters_library import BOTTLENECK, FILE, IDS, PREFIX, model_of, value_of
from tests.cases import answer, batch_of, fresh, gradients, loss_of, moved
from tests.memory.models import batch_of as batch_for_memory
from tests.memory.models import held
from tests.memory.models import model_of as model_for_memory
from tests.pictures import differences, picture, tensors
from tests.tiny import checkpointed, tiny_batch, tiny_model

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-11}

# ---- the library


def our_name(theirs: str) -> str:
    """A parameter's name here, by the library's, which has the prefix's in its first layer."""
    host, inside, key = theirs.partition(".adapters.a.adapter_")
    if inside:
        which, _, key = key.replace("down.0.", "down.").partition(".")
        return f"{host}.dense.adapter_{which}" + "_bias" * (key == "bias")
    key = theirs.partition(".self_prefix.")[2].replace("wte.weight", "table").removeprefix("control_trans.")
    return f"prefix_{key.replace('.', '_')}"


def test_outputs_and_every_gradient_are_those_of_the_library():
    """There a prefix doesn't move the text's positions on, so the text is numbered from −P on here.

    Of BERT: a Llama's parallel adapter reads what the norm before the feed-forward reads there, and here what it gives.
    """
    stored, model = load_file(FILE), model_of("bert")
    for name, p in model.named_parameters():
        p.data.copy_(stored[f"bert/{name}"])
    MAM(
        num_virtual_tokens=PREFIX, prefix_projection=True, encoder_hidden_size=5, bottleneck=BOTTLENECK
    ).attach(model)
    found = {name.removeprefix("bert-mam/"): t for name, t in stored.items() if name.startswith("bert-mam/")}
    theirs = {our_name(n.removeprefix("value/")): t for n, t in found.items() if n.startswith("value/")}
    assert set(trainable(model)) == set(theirs)
    for name, value in theirs.items():
        model.get_parameter(name).data.copy_(value)
    hidden, value = value_of(model, position_ids=torch.arange(IDS.shape[1]).expand_as(IDS) - PREFIX)
    torch.testing.assert_close(hidden, found["hidden"], **EXACT)
    expected = {our_name(n.removeprefix("grad/")): t for n, t in found.items() if n.startswith("grad/")}
    ours = gradients(model, value)
    assert set(ours) == set(expected) == set(theirs)
    for name, grad in ours.items():
        assert grad.abs().max() > 1e-6, f"{name}: a gradient of zero would prove nothing"
        torch.testing.assert_close(grad, expected[name], **EXACT, msg=name)


# ---- its halves


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
def test_it_is_a_prefix_and_a_parallel_adapter_side_by_side(kind):
    """Outputs and every gradient, bit for bit, with the same values in both."""
    prefix, adapter = {"num_virtual_tokens": 3}, {"bottleneck": 5, "scaling": 1.5, "activation": "tanh"}
    ours = moved(MAM(**prefix, **adapter).attach(tiny_model(kind, dtype=F64)))
    others = PrefixTuning(**prefix).attach(tiny_model(kind, dtype=F64), name="prefix")
    others = Adapter(placement="parallel", **adapter).attach(others, name="beside")
    for name in trainable(others):
        others.get_parameter(name).data.copy_(ours.get_parameter(name.partition("@")[0]))
    inputs = tiny_batch(kind, side="left", dtype=F64)
    assert torch.equal(answer(ours, inputs), answer(others, inputs))
    found = gradients(ours, loss_of(ours, inputs))
    theirs = {n.partition("@")[0]: g for n, g in gradients(others, loss_of(others, inputs)).items()}
    assert found.keys() == theirs.keys() == trainable(ours).keys()
    for name, grad in found.items():
        assert grad.abs().max() > 1e-8
        assert torch.equal(grad, theirs[name]), name


def test_at_the_start_the_adapters_do_nothing_and_the_prefix_does():
    model = MAM(num_virtual_tokens=3, bottleneck=4).attach(fresh("llama"))
    alone = PrefixTuning(num_virtual_tokens=3).attach(fresh("llama"))
    assert torch.equal(answer(model, batch_of("llama")), answer(alone, batch_of("llama")))


def test_without_its_mlp_it_says_what_it_said_and_is_saved_so(tmp_path):
    method = MAM(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=5, bottleneck=4)
    model = moved(method.attach(fresh("gpt2")))
    said = answer(model, batch_of("gpt2"))
    method.drop_projection(model)
    assert torch.equal(answer(model, batch_of("gpt2")), said)
    short = MAM(num_virtual_tokens=3, encoder_hidden_size=5, bottleneck=4)
    assert sum(trainable(model).values()) == short.count(fresh("gpt2")) < method.count(fresh("gpt2"))
    save(model, tmp_path)
    assert torch.equal(answer(load(fresh("gpt2"), tmp_path), batch_of("gpt2")), said)


def test_named_layers_are_kept_in_a_file(tmp_path):
    named = {"adapter_modules": r".*\.mlp\.down_proj", "input_modules": ("mlp.gate_proj",)}
    model = moved(MAM(num_virtual_tokens=3, bottleneck=4, **named).attach(fresh("llama")))
    found = MAM(num_virtual_tokens=3, bottleneck=4).attach(fresh("llama"))
    assert trainable(model) == trainable(found)
    save(model, tmp_path)
    again = load(fresh("llama"), tmp_path)
    assert torch.equal(answer(again, batch_of("llama")), answer(model, batch_of("llama")))


# ---- counts, memory, refusals


def test_the_adapters_of_bart_large_and_their_share_are_the_published_ones():
    """He et al., table 6: 6.7 %, with their prefixes in three attentions of 24 layers, which are three times ours."""
    with torch.device("meta"):
        model = hf.BartForConditionalGeneration(hf.BartConfig())
    places = {"adapter_modules": ("fc2",), "input_modules": ("fc1",)}
    both, prefix = MAM(**places).count(model), PrefixTuning(num_virtual_tokens=30).count(model)
    assert both - prefix == 25_202_688
    assert 3 * prefix == 2_211_840
    assert round(100 * (25_202_688 + 2_211_840) / sum(p.numel() for p in model.parameters()), 1) == 6.7


@pytest.mark.parametrize(
    ("kind", "projection", "checkpointing", "dtype"),
    [
        ("llama", False, False, torch.float32),
        ("llama", True, True, torch.float32),
        ("gpt2", True, False, torch.float32),
        ("bert", False, False, torch.bfloat16),
    ],
)
def test_what_a_step_keeps_for_it_is_estimated(kind, projection, checkpointing, dtype):
    model, method = (
        model_for_memory(kind, dtype=dtype),
        MAM(num_virtual_tokens=6, prefix_projection=projection, bottleneck=16),
    )
    options = {"batch_size": 2, "sequence_length": 24, "attention": "eager"}
    estimated = memory.estimate(model, method, **options, device="cpu", gradient_checkpointing=checkpointing)
    method.attach(model)
    if checkpointing:
        checkpointed(model, reentrant=True)
    assert estimated.trained == sum(trainable(model).values()) == method.count(model)
    measured = held(model, batch_for_memory(kind, 2, 24, dtype))
    assert sum(estimated.activations.values()) == pytest.approx(measured, rel=0.02)


def test_a_seed_fixes_the_start_and_another_one_gives_another():
    one, same, other = (
        tensors(MAM(num_virtual_tokens=2, bottleneck=4, init_seed=i).attach(fresh("gpt2"))) for i in (1, 1, 2)
    )
    assert differences(one, same) == []
    assert differences(one, other)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"bottleneck": 28}, "bottleneck is 28, but .* gives 24 features: it must be at most 24"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0; it must be a whole number ≥ 1"),
        ({"scaling": 0}, "scaling is 0; it must be a number > 0"),
        ({"activation": "swish"}, "activation is 'swish'; it must be one of 'gelu'"),
        ({"adapter_modules": ("down_proj",)}, "and input_modules what they read: give both or neither"),
        (
            {"adapter_modules": ("wrong",), "input_modules": ("gate_proj",)},
            "adapter_modules: this model has no 'wrong'",
        ),
        (
            {"adapter_modules": ("down_proj",), "input_modules": ("0.mlp.gate_proj",)},
            "adapter_modules finds 2 layers and input_modules 1; expected one for each",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(fields, says):
    model = tiny_model("llama")
    before = picture(model)
    with pytest.raises(ValueError, match=says):
        MAM(**({"bottleneck": 4} | fields)).attach(model)
    assert differences(before, picture(model)) == []
