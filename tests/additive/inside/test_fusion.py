"""AdapterFusion against the library `adapters` (stored results), its limits, and what it does to other attachments."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pefttutor import (
    PASTA,
    Adapter,
    AdapterFusion,
    DoRA,
    LoRA,
    attached,
    detach,
    fit,
    load,
    memory,
    save,
    switch,
    trainable,
)
from pefttutor.saving.adapters import TENSORS, description
from pefttutor.train.hooks import Hooks
from tests.additive.inside.adapters_library import BOTTLENECK, FILE, model_of, value_of
from tests.cases import answer, base_answer, batch_of, fresh, gradients, moved, prepared
from tests.memory.models import batch_of as batch_for_memory
from tests.memory.models import held
from tests.memory.models import model_of as model_for_memory
from tests.pictures import differences, picture, tensors
from tests.tiny import rows_of

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-11}
FUSION = AdapterFusion(adapters=("a", "b"))

# ---- the library

PFEIFFER = Adapter(bottleneck=BOTTLENECK, placement="pfeiffer", activation="relu")
AT_NORM = Adapter(
    bottleneck=BOTTLENECK, activation="relu", target_modules=r"encoder\.layer\.\d+\.output\.LayerNorm"
)
LIBRARY = {
    "bert-fused-pfeiffer": (PFEIFFER, ".dense"),
    "bert-fused-at-norm": (AT_NORM, ".LayerNorm"),
    "llama-fused-pfeiffer": (PFEIFFER, ""),
}


def our_name(case: str, theirs: str) -> str:
    """A parameter's name here, by the library's."""
    host, _, rest = theirs.partition(".adapter_fusion_layer.a,b.")
    if rest:
        name, key = "fusion", f"fusion_{rest.replace('.weight', '').replace('.bias', '_bias')}"
    else:
        host, _, rest = theirs.partition(".adapters.")
        name, _, key = rest.partition(".")
        key = key.replace("down.0.", "down.").replace(".weight", "").replace(".bias", "_bias")
    host = host.replace("output_adapters", "mlp.down_proj") + LIBRARY[case][1]
    return f"{host}.{key}@{name}"


@pytest.mark.parametrize("case", LIBRARY)
def test_outputs_and_every_gradient_are_those_of_the_library(case):
    """The library's keys have a bias, here 0.9 and less: that it is missed nowhere shows that it has no effect."""
    stored, kind = load_file(FILE), case.split("-")[0]
    model = model_of(kind)
    for name, p in model.named_parameters():
        p.data.copy_(stored[f"{kind}/{name}"])
    for name in ("a", "b"):
        LIBRARY[case][0].attach(model, name=name)
    FUSION.attach(model, name="fusion")
    found = {name.removeprefix(f"{case}/"): t for name, t in stored.items() if name.startswith(f"{case}/")}
    theirs = {n.removeprefix("value/"): t for n, t in found.items() if n.startswith("value/")}
    biases = {name for name in theirs if name.endswith("key.bias")}
    added = [p for a in attached(model).values() for p in a.trained()]
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in added} == {our_name(case, name) for name in theirs.keys() - biases}
    for name in theirs.keys() - biases:
        model.get_parameter(our_name(case, name)).data.copy_(theirs[name])
    assert set(trainable(model)) == {name for name in names.values() if name.endswith("@fusion")}
    for p in added:
        p.requires_grad_(True)  # so that the adapters' gradients can be compared as well
    hidden, value = value_of(model)
    torch.testing.assert_close(hidden, found["hidden"], **EXACT)
    ours = gradients(model, value)
    assert len(ours) == len(theirs) - len(biases)
    for name in theirs:
        expected = found[f"grad/{name}"]
        if name in biases:
            assert expected.abs().max() < 1e-13
            continue
        if "fusion" in name:  # of an adapter, one of three ReLU units may be closed
            assert expected.abs().max() > 1e-6, f"{name}: a gradient of zero would prove nothing"
        torch.testing.assert_close(ours[our_name(case, name)], expected, **EXACT, msg=name)


def test_the_count_for_bert_base_is_the_published_one():
    """Pfeiffer adapters fused: 21.25 million values. The library's keys have 768 biases a layer, without effect."""
    with torch.device("meta"):
        model = hf.BertForSequenceClassification(hf.BertConfig())
        base = sum(p.numel() for p in model.parameters())
        for name in ("a", "b"):
            Adapter(placement="pfeiffer", target_modules=r".*\.\d+\.output\.dense").attach(model, name=name)
    count = FUSION.count(model)
    assert count + 12 * 768 == 12 * (3 * 768**2 + 2 * 768) == 21_252_096
    assert round(100 * count / base) == 19


# ---- its limits


@pytest.mark.parametrize("kind", ["llama", "bert", "net"])
def test_one_adapter_fused_is_that_adapter_bit_for_bit(kind):
    model = switch(prepared("AdapterFusion", kind), "b")
    alone = answer(model, batch_of(kind))
    AdapterFusion(adapters=("b",)).attach(model)
    assert torch.equal(answer(model, batch_of(kind)), alone)
    assert not torch.equal(alone, base_answer(kind))


def test_the_order_of_the_adapters_changes_nothing():
    found = []
    for adapters in (("a", "b"), ["b", "a"]):
        model = prepared("AdapterFusion", "bert").double()
        found.append(answer(moved(AdapterFusion(adapters=adapters).attach(model)), batch_of("bert")))
    torch.testing.assert_close(*found, **EXACT)


def test_a_large_score_chooses_one_adapter():
    """With K = I and a large bias along what one adapter adds, its share is 1."""
    layer, x = nn.Linear(4, 3, dtype=F64), torch.randn(5, 4, dtype=F64)
    model = nn.ModuleDict({"it": layer})
    method = Adapter(bottleneck=2, target_modules=("it",))
    for name, sign in (("a", 1.0), ("b", -1.0)):
        method.attach(model, name=name)
        layer.get_parameter(f"adapter_up_bias@{name}").data.fill_(sign)
    FUSION.attach(model, name="f")
    layer.get_parameter("fusion_key@f").data.copy_(torch.eye(3))
    layer.get_parameter("fusion_query_bias@f").data.fill_(-100.0)
    torch.testing.assert_close(layer(x), x @ layer.weight.mT + layer.bias - 1)


def test_the_penalty_is_the_distance_of_v_from_the_identity():
    model = moved(FUSION.attach(prepared("AdapterFusion", "bert"), name="f"))
    values = [p for n, p in model.named_parameters() if "fusion_value" in n]
    assert len(values) == 4
    expected = 0.01 * sum(((v - torch.eye(24)) ** 2).sum() for v in values)
    penalty = Hooks(model).penalty()
    torch.testing.assert_close(penalty, expected)
    for v, grad in zip(values, torch.autograd.grad(penalty, values), strict=True):
        torch.testing.assert_close(grad, 0.02 * (v - torch.eye(24)))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(Hooks(model).penalty(), expected)
    assert Hooks(switch(model, "a")).penalty() == 0
    FUSION.attach(switch(model, "f"), name="g")  # of the same settings, and at its start
    torch.testing.assert_close(Hooks(model).penalty(), expected)
    assert Hooks(switch(model, "g")).penalty() == 0
    off = AdapterFusion(adapters=("a", "b"), regularization_weight=0)
    assert Hooks(off.attach(prepared("AdapterFusion", "bert"))).penalty() == 0


def test_a_seed_fixes_the_start_and_another_one_gives_another():
    def start(seed: int) -> dict[str, Tensor]:
        method = AdapterFusion(adapters=("a", "b"), init_seed=seed)
        return tensors(method.attach(prepared("AdapterFusion", "net")))

    one, same, other = map(start, (1, 1, 2))
    assert differences(one, same) == []
    assert {name.rpartition(".")[2] for name in differences(one, other)} == {"fusion_query", "fusion_key"}
    drawn = torch.cat([t.flatten() for n, t in one.items() if n.endswith(("fusion_query", "fusion_key"))])
    assert drawn.std().item() == pytest.approx(0.02, rel=0.15)


# ---- beside others


def test_the_adapters_stay_as_they_are_and_act_again_in_its_place(tmp_path):
    model, inputs = prepared("AdapterFusion", "bert"), batch_of("bert")
    before = tensors(model)
    alone = {name: answer(switch(model, name), inputs) for name in ("a", "b")}
    switch(model, "a", "b")
    FUSION.attach(model, name="f")
    assert [a.active for a in attached(model).values()] == [False, False, True]
    assert all(name.endswith("@f") for name in trainable(model))
    fit(model, rows_of(inputs), steps=3, batch_size=3, lr=1e-2, progress=False)
    assert differences({name: t for name, t in tensors(model).items() if name in before}, before) == []
    fused = answer(model, inputs)
    for name, expected in alone.items():
        assert torch.equal(answer(switch(model, name), inputs), expected)
    assert torch.equal(answer(switch(model, "f"), inputs), fused)
    assert torch.equal(answer(switch(model), inputs), base_answer("bert"))
    detach(model, "f")
    assert torch.equal(answer(switch(model, "a"), inputs), alone["a"])


def test_two_of_them_act_twice_only_if_somebody_asks_for_the_same_thing_twice():
    model = FUSION.attach(prepared("AdapterFusion", "bert"), name="f")
    before = picture(model)
    with pytest.raises(ValueError, match=r"'f' \(AdapterFusion\) computes with 'a' already.*one of the two"):
        switch(model, "a", "f")
    with pytest.raises(ValueError, match=r"'f' \(AdapterFusion\) computes with 'b': take that one out first"):
        detach(model, "b")
    assert differences(before, picture(model)) == []
    assert [a.active for a in attached(model).values()] == [False, False, True]
    assert list(attached(detach(model, "b", "f"))) == ["a"]


def test_a_failed_attach_leaves_the_adapters_on():
    model = switch(prepared("AdapterFusion", "bert"), "a", "b")
    said = answer(model, batch_of("bert"))  # it notes in the config what labels are
    before = picture(model)
    with pytest.raises(ValueError, match="modules_to_save: this model has no 'wrong'"):
        AdapterFusion(adapters=("a", "b"), modules_to_save=("wrong",)).attach(model, name="f")
    assert differences(before, picture(model)) == []
    assert [a.active for a in attached(model).values()] == [True, True]
    assert torch.equal(answer(model, batch_of("bert")), said)


def test_a_file_of_it_fits_the_adapters_that_it_was_trained_with_and_no_others(tmp_path):
    model = moved(FUSION.attach(prepared("AdapterFusion", "net"), name="f"))
    save(model, tmp_path, name="f")
    other = prepared("AdapterFusion", "net")
    other.get_parameter("blocks.1.down.adapter_up@b").data.add_(1)
    before = picture(switch(other, "a"))
    with pytest.raises(
        ValueError, match=r"computes with \('a', 'b'\), and these were others: here .*adapter_up@b has"
    ):
        load(other, tmp_path, name="f")
    assert differences(before, picture(other)) == []
    assert [a.active for a in attached(other).values()] == [True, False]
    assert not torch.equal(answer(other, batch_of("net")), base_answer("net"))
    with pytest.raises(ValueError, match="no method is attached to this model"):
        load(fresh("net"), tmp_path)
    for wrong, says in (({}, "is too much"), (5, "is damaged")):
        about = description(model, "f") | {"reads": wrong}
        header = {"pefttutor": json.dumps(about)}
        save_file(load_file(tmp_path / TENSORS), tmp_path / "wrong.safetensors", metadata=header)
        (tmp_path / str(wrong)).mkdir()
        (tmp_path / "wrong.safetensors").rename(tmp_path / str(wrong) / TENSORS)
        with pytest.raises(ValueError, match=says):
            load(prepared("AdapterFusion", "net"), tmp_path / str(wrong))
    again = load(prepared("AdapterFusion", "net"), tmp_path)
    assert torch.equal(answer(again, batch_of("net")), answer(model, batch_of("net")))


def test_lora_below_it_still_counts_and_dora_goes_beneath():
    model = moved(LoRA(r=2, target_modules=("down_proj",)).attach(fresh("llama"), name="lora"))
    for seed, name in enumerate("ab"):
        Adapter(bottleneck=3, placement="pfeiffer").attach(model, name=name)
        moved(switch(model, "lora", name, train=(name,)), seed)
    fusion = AdapterFusion(adapters=("a",))
    plain = answer(fusion.attach(switch(model, "lora", "a"), name="f"), batch_of("llama"))
    assert torch.equal(plain, answer(switch(model, "lora", "a"), batch_of("llama")))
    switch(model, "f")
    with pytest.raises(ValueError, match=r"has the fusion 'f' of adapters.*: attach that one first"):
        DoRA(r=2, target_modules=("down_proj",)).attach(model, name="dora")


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_step_keeps_for_it_is_estimated(kind, dtype):
    model = model_for_memory(kind, dtype=dtype)
    at_norm = ("output.LayerNorm",) if kind == "bert" else None
    for name in ("a", "b"):
        Adapter(bottleneck=16, target_modules=at_norm).attach(model, name=name)
    options = {"batch_size": 2, "sequence_length": 24, "attention": "eager", "device": "cpu"}
    estimated = memory.estimate(model, FUSION, **options)
    FUSION.attach(model)
    assert estimated.trained == sum(trainable(model).values())
    assert memory.estimate(model, **options) == estimated
    measured = held(model, batch_for_memory(kind, 2, 24, dtype))
    assert sum(estimated.activations.values()) == pytest.approx(measured, rel=0.02)


# ---- refusals


def with_two(one: object, other: object) -> nn.Module:
    return other.attach(one.attach(fresh("bert"), name="a"), name="b")


PLAIN = Adapter(bottleneck=3)
REFUSED = [
    (PLAIN, PLAIN, AdapterFusion(), r"adapters is empty; name those .*This model carries \('a', 'b'\)"),
    (PLAIN, PLAIN, AdapterFusion(adapters=("a", "c")), r"nothing called 'c' is attached.*it carries 'a'"),
    (PLAIN, LoRA(r=2, target_modules=("query",)), FUSION, r"'b' \(LoRA\) has no bottleneck adapter"),
    (PLAIN, PASTA(special_token_ids=(1,)), FUSION, r"'b' \(PASTA\) has no bottleneck adapter"),
    (PLAIN, Adapter(bottleneck=3, placement="parallel"), FUSION, r"'b' \(Adapter\) stands beside its subl"),
    (PLAIN, Adapter(bottleneck=3, placement="pfeiffer"), FUSION, r"only one of them is at '.*attention\.out"),
    (PLAIN, Adapter(bottleneck=3, train_norms=True), FUSION, r"'b' \(Adapter\) has trained '.*LayerNorm.weig"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other", "method", "says"), REFUSED)
def test_what_cannot_be_fused_is_refused_and_changes_nothing(one, other, method, says):
    model = with_two(one, other)
    before = picture(model)
    with pytest.raises(ValueError, match=says):
        method.attach(model, name="f")
    assert differences(before, picture(model)) == []
    assert all(a.active for a in attached(model).values())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"adapters": "ab"}, r"adapters is a string; write \('ab',\)"),
        ({"adapters": ("a", "a")}, "adapters names 'a' twice"),
        ({"adapters": (1, 2)}, "adapters is .1, 2.; it must be names"),
        ({"regularization_weight": -1.0}, "regularization_weight is -1.0; it must be a number ≥ 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        AdapterFusion(**fields)


def test_heads_of_the_adapters_stay_out_and_a_new_one_is_its_own():
    method = Adapter(bottleneck=3, modules_to_save=("classifier",))
    model = fresh("bert")
    for seed, name in enumerate("ab"):
        switch(method.attach(switch(model) if seed else model, name=name), name)
        moved(model, seed)
    switch(model)
    AdapterFusion(adapters=("a", "b"), modules_to_save=("classifier",)).attach(model, name="f")
    assert torch.equal(model.classifier.weight, fresh("bert").classifier.weight)
    assert {"classifier.weight", "classifier.bias"} <= set(trainable(model))
    assert FUSION.count(model) + sum(p.numel() for p in model.classifier.parameters()) == sum(
        trainable(model).values()
    )
    assert copy.deepcopy(model).classifier.weight.requires_grad
