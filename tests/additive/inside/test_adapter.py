"""Bottleneck adapters against the library `adapters` (stored results) and against their formula in hooks of our own."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import pickle

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor import PASTA, Adapter, DoRA, LoRA, attached, detach, load, merge, save, switch, trainable
from tests.additive.inside.adapters_library import BOTTLENECK, FILE, model_of, value_of
from tests.cases import TEXTS, answer, base_answer, batch_of, fresh, gradients, loss_of, moved
from tests.pictures import differences, picture, tensors
from tests.tiny import checkpointed, tiny_batch, tiny_model

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-11}
PLACEMENTS = ("houlsby", "pfeiffer", "parallel")

# ---- the library

LIBRARY = {
    "bert-houlsby": Adapter(bottleneck=BOTTLENECK, train_norms=True),
    "bert-pfeiffer": Adapter(bottleneck=BOTTLENECK, placement="pfeiffer", activation="relu"),
    "bert-at-norm": Adapter(
        bottleneck=BOTTLENECK, activation="relu", target_modules=r"encoder\.layer\.\d+\.output\.LayerNorm"
    ),
    "bert-parallel": Adapter(bottleneck=BOTTLENECK, placement="parallel", activation="silu", scaling=4.0),
    "llama-houlsby": Adapter(bottleneck=BOTTLENECK, train_norms=True),
    "llama-pfeiffer": Adapter(bottleneck=BOTTLENECK, placement="pfeiffer", activation="relu"),
}


def our_name(case: str, theirs: str) -> str:
    """A parameter's name here, by the library's."""
    host, inside, key = theirs.partition(".adapters.a.adapter_")
    if not inside:
        return theirs
    if case.startswith("llama"):
        place = {"attention_adapters": "self_attn.o_proj", "output_adapters": "mlp.down_proj"}
        before, _, end = host.rpartition(".")
        host = f"{before}.{place[end]}"
    else:
        host += ".LayerNorm" if "at-norm" in case else ".dense"
    key = key.replace("down.0.", "down.").replace(".weight", "").replace(".bias", "_bias")
    return f"{host}.adapter_{key}"


@pytest.mark.parametrize("case", LIBRARY)
def test_outputs_and_every_gradient_are_those_of_the_library(case):
    stored, kind = load_file(FILE), case.split("-")[0]
    model = model_of(kind)
    weights = dict(model.named_parameters())
    for name, p in weights.items():
        p.data.copy_(stored[f"{kind}/{name}"])
    LIBRARY[case].attach(model)
    found = {name.removeprefix(f"{case}/"): t for name, t in stored.items() if name.startswith(f"{case}/")}
    theirs = {n.removeprefix("value/"): t for n, t in found.items() if n.startswith("value/")}
    added = set(trainable(model)) - set(weights)
    assert added == {our_name(case, name) for name in theirs}
    for name, value in theirs.items():
        model.get_parameter(our_name(case, name)).data.copy_(value)
    hidden, value = value_of(model)
    torch.testing.assert_close(hidden, found["hidden"], **EXACT)
    expected = {our_name(case, n.removeprefix("grad/")): t for n, t in found.items() if n.startswith("grad/")}
    ours = gradients(model, value)
    assert set(ours) == set(expected) == set(trainable(model))
    for name, grad in ours.items():
        assert grad.abs().max() > 1e-6, f"{name}: a gradient of zero would prove nothing"
        torch.testing.assert_close(grad, expected[name], **EXACT, msg=name)


# ---- the formula

SUBLAYERS = {  # of the feed-forward: what is called with its input, and what gives its output
    "llama": ("mlp", "mlp"),
    "gpt2": ("mlp", "mlp"),
    "bert": ("intermediate.dense", "output.dense"),
    "t5": ("DenseReluDense", "DenseReluDense"),
    "vit": ("mlp", "mlp"),
}


def by_hand(kind: str, placement: str, method: Adapter, adapters: dict[str, dict[str, Tensor]]) -> nn.Module:
    """The base with hooks of our own: `adapters` by the name of the layer that they belong to."""
    base, inputs = tiny_model(kind, dtype=F64), {}

    def branch(w: dict[str, Tensor], x: Tensor) -> Tensor:
        narrow = torch.tanh(x @ w["down"].mT + w["down_bias"])
        return method.scaling * (narrow @ w["up"].mT + w["up_bias"])

    def serial(w, module, args, output):
        return output + branch(w, output)

    def note(block, module, args):
        inputs[block] = args[0]

    def parallel(w, block, module, args, output):
        return output + branch(w, inputs[block])

    enters, leaves = SUBLAYERS[kind]
    for path, w in adapters.items():
        if placement != "parallel":
            base.get_submodule(path).register_forward_hook(functools.partial(serial, w))
            continue
        block = path[: path.index(leaves)]
        base.get_submodule(block + enters).register_forward_pre_hook(functools.partial(note, block))
        base.get_submodule(block + leaves).register_forward_hook(functools.partial(parallel, w, block))
    return base


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", SUBLAYERS)
def test_outputs_and_every_gradient_are_those_of_the_formula(kind, placement):
    method = Adapter(placement=placement, bottleneck=5, scaling=1.5, activation="tanh")
    ours, inputs = moved(method.attach(tiny_model(kind, dtype=F64))), tiny_batch(kind, side="left", dtype=F64)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in ours.named_parameters() if p.requires_grad}
    adapters: dict[str, dict[str, Tensor]] = {}
    for name, leaf in leaves.items():
        path, _, key = name.rpartition(".adapter_")
        adapters.setdefault(path, {})[key] = leaf
    per_block = {"houlsby": 2, "pfeiffer": 1, "parallel": 1}[placement]
    cross = 2 if kind == "t5" and placement == "houlsby" else 0
    assert len(adapters) == (4 if kind == "t5" else 2) * per_block + cross
    base = by_hand(kind, placement, method, adapters)
    torch.testing.assert_close(answer(ours, inputs), answer(base, inputs), **EXACT)
    loss = loss_of(base, inputs)
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    found = gradients(ours, loss_of(ours, inputs))
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert grad.abs().max() > 1e-8, f"{name}: a gradient of zero would prove nothing"
        torch.testing.assert_close(grad, expected[name], **EXACT, msg=name)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "tanh"])
def test_the_plain_formula_on_one_layer_and_at_a_norm(activation):
    model = nn.ModuleDict({"down": nn.Linear(6, 4, dtype=F64), "norm": nn.LayerNorm(4, dtype=F64)})
    Adapter(bottleneck=3, scaling=0.7, activation=activation, target_modules=("down", "norm")).attach(model)
    moved(model)

    def branch(layer: nn.Module, h: Tensor) -> Tensor:
        narrow = getattr(F, activation)(F.linear(h, layer.adapter_down, layer.adapter_down_bias))
        return 0.7 * F.linear(narrow, layer.adapter_up, layer.adapter_up_bias)

    x, z, down, norm = torch.randn(2, 3, 6, dtype=F64), torch.randn(2, 3, 4, dtype=F64), *model.values()
    h = F.linear(x, down.weight, down.bias)
    torch.testing.assert_close(down(x), h + branch(down, h), **EXACT)
    normed = functools.partial(F.layer_norm, normalized_shape=(4,), weight=norm.weight, bias=norm.bias)
    torch.testing.assert_close(norm(z), normed(z + branch(norm, normed(z))), **EXACT)
    assert torch.autograd.gradcheck(lambda t: down(t), x.clone().requires_grad_())


def test_a_norm_may_call_its_scale_as_it_likes():
    class ScaleNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x / x.norm(dim=-1, keepdim=True)

    method, z = (
        Adapter(bottleneck=2, target_modules=("0",), init_std=0.3, activation="relu"),
        torch.randn(3, 4),
    )
    model = nn.Sequential(ScaleNorm())
    base = copy.deepcopy(model)
    assert method.count(model) == 2 * 2 * 4 + 2 + 4
    norm = method.attach(model, name="a")[0]
    down, up = norm.get_parameter("adapter_down@a"), norm.get_parameter("adapter_up@a")
    torch.testing.assert_close(model(z), base(z + (base(z) @ down.mT).relu() @ up.mT))
    method.attach(model, name="b")
    assert norm.get_parameter("adapter_up@b").shape == (4, 2)


# ---- the start, and the count


def test_it_starts_as_the_base_or_within_two_deviations_of_it():
    exact = Adapter(bottleneck=5).attach(fresh("bert"))
    assert torch.equal(answer(exact, batch_of("bert")), base_answer("bert"))
    near = Adapter(bottleneck=5, init_std=0.01).attach(fresh("bert"))
    distance = (answer(near, batch_of("bert")) - base_answer("bert")).norm() / base_answer("bert").norm()
    assert 0 < distance < 1e-2
    for name, p in near.named_parameters():
        if "adapter_" in name:
            assert p.abs().max() <= (0 if name.endswith("bias") else 0.02)
    drawn = torch.cat([p.flatten() for n, p in near.named_parameters() if n.endswith(("_down", "_up"))])
    assert drawn.std().item() == pytest.approx(0.0088, rel=0.1)  # a normal within ± 2 deviations is narrower


def test_a_seed_fixes_the_start_and_another_one_gives_another():
    one, same, other = (tensors(Adapter(bottleneck=3, init_seed=i).attach(fresh("gpt2"))) for i in (1, 1, 2))
    assert differences(one, same) == []
    changed = differences(one, other)
    assert changed
    assert all(name.endswith(("adapter_down", "adapter_down_bias")) for name in changed)


@pytest.mark.parametrize(("placement", "adapters"), [("houlsby", 2), ("pfeiffer", 1), ("parallel", 1)])
def test_the_count_for_bert_base_is_the_closed_formula(placement, adapters):
    """Houlsby et al., section 2.1: 2md + d + m an adapter; with m = 64 the two of a block hold 1.8 % of BERT's."""
    with torch.device("meta"):
        model = hf.BertForSequenceClassification(hf.BertConfig())
    each = 2 * 64 * 768 + 768 + 64
    assert Adapter(placement=placement).count(model) == 12 * adapters * each
    norms = 25 * 2 * 768
    assert Adapter(placement=placement, train_norms=True).count(model) == 12 * adapters * each + norms


# ---- AdapterDrop, and norms


def test_below_the_first_adapter_every_hidden_state_is_the_bases_bit_for_bit():
    inputs = {key: value for key, value in batch_of("bert").items() if key != "labels"}
    base = tiny_model("bert", layers=4)
    expected = base(**inputs, output_hidden_states=True).hidden_states
    method = Adapter(bottleneck=3, skip_blocks=(0, 1), train_norms=True)
    model = moved(method.attach(copy.deepcopy(base)))
    found = model(**inputs, output_hidden_states=True).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(found[:3], expected[:3], strict=True))
    assert not torch.equal(found[3], expected[3])
    assert {name.split(".")[3] for name in trainable(model)} == {"2", "3"}
    assert method.count(base) == sum(trainable(model).values())


def test_houlsbys_norms_train_and_come_back(tmp_path):
    base = fresh("bert")
    model = moved(Adapter(bottleneck=3, train_norms=True).attach(fresh("bert")))
    norms = {name for name in dict(base.named_parameters()) if "LayerNorm" in name}
    assert set(trainable(model)) & set(dict(base.named_parameters())) == norms
    save(model, tmp_path)
    again = load(fresh("bert"), tmp_path)
    assert torch.equal(answer(again, batch_of("bert")), answer(model, batch_of("bert")))
    assert differences(tensors(base), tensors(detach(model))) == []


def test_a_pattern_is_saved_beside_norms_that_train(tmp_path):
    """The names that a pattern found are read from the tensors; the norms' own are no targets."""
    method = Adapter(bottleneck=3, target_modules=r".*\.output\.(dense|LayerNorm)", train_norms=True)
    model = moved(method.attach(fresh("bert"), name="a"))
    save(model, tmp_path)
    again = load(fresh("bert"), tmp_path)
    assert torch.equal(answer(again, batch_of("bert")), answer(model, batch_of("bert")))


# ---- beside others


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_two_stand_side_by_side_and_each_acts_alone(placement):
    inputs = batch_of("llama")
    method = Adapter(placement=placement, bottleneck=3)
    alone = [answer(moved(method.attach(fresh("llama")), seed), inputs) for seed in (1, 2)]
    model = fresh("llama")
    for seed, name in ((1, "a"), (2, "b")):
        switch(method.attach(model, name=name), name)
        moved(model, seed)
    for name, expected in zip(("a", "b"), alone, strict=True):
        assert torch.equal(answer(switch(model, name), inputs), expected)
    both = answer(switch(model, "a", "b"), inputs)
    assert not any(torch.equal(both, one) for one in alone)
    assert torch.equal(answer(switch(model), inputs), base_answer("llama"))


def test_two_stand_at_the_same_norms():
    method = Adapter(bottleneck=3, target_modules=("output.LayerNorm",), train_norms=True)
    count = method.count(fresh("bert"))
    model = method.attach(fresh("bert"), name="a")
    assert method.count(model) == count == sum(trainable(model).values())
    other = dataclasses.replace(method, train_norms=False)
    moved(switch(other.attach(model, name="b"), "b"))
    alone = moved(other.attach(fresh("bert"), name="b"))
    assert torch.equal(answer(model, batch_of("bert")), answer(alone, batch_of("bert")))
    assert trainable(model) == trainable(alone)


def test_lora_in_the_same_layer_is_merged_only_while_the_adapter_is_off():
    model = LoRA(r=2, target_modules=("down_proj",)).attach(fresh("llama"), name="lora")
    moved(Adapter(bottleneck=3, placement="pfeiffer").attach(model, name="adapter"))
    with pytest.raises(ValueError, match="share a weight"):
        merge(model, "lora")
    expected = answer(switch(model, "lora"), batch_of("llama"))
    torch.testing.assert_close(
        answer(merge(model, "lora"), batch_of("llama")), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_dora_goes_beneath_an_adapter_and_not_on_it(placement):
    """Its norm is that of a weight, and none holds the adapter's nonlinearity."""
    adapter, dora = (
        Adapter(bottleneck=3, placement=placement),
        DoRA(r=2, target_modules=("down_proj",)),
    )
    model = adapter.attach(fresh("llama"))
    before = picture(model)
    with pytest.raises(ValueError, match=r"has the bottleneck adapter 'default'.*: attach that one first"):
        dora.attach(model, name="dora")
    assert differences(before, picture(model)) == []
    both = adapter.attach(dora.attach(fresh("llama"), name="dora"))
    torch.testing.assert_close(answer(both, batch_of("llama")), base_answer("llama"), rtol=1e-4, atol=1e-5)


def test_what_other_methods_have_added_ends_no_sublayer():
    """PASTA's vectors go into the residual sum without a linear layer."""
    model = PASTA(special_token_ids=(1, 2)).attach(fresh("llama"), name="pasta")
    found = trainable(switch(Adapter(bottleneck=3).attach(model), "default"))
    assert found == trainable(Adapter(bottleneck=3).attach(fresh("llama")))


# ---- a parallel adapter carries a tensor from one layer to another


@pytest.mark.parametrize("reentrant", [True, False])
def test_parallel_adapters_are_checkpointed_with_every_gradient(reentrant):
    model, inputs = (
        moved(Adapter(placement="parallel", bottleneck=3).attach(fresh("llama"))),
        batch_of("llama"),
    )
    expected = gradients(model.train(), loss_of(model, inputs))
    found = gradients(model, loss_of(checkpointed(model, reentrant=reentrant), inputs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("through", ["copying", "pickling", "checkpointing"])
def test_a_model_with_parallel_adapters_is_copied_and_pickled_after_a_step(through):
    model, inputs = (
        moved(Adapter(placement="parallel", bottleneck=3).attach(fresh("llama"))),
        batch_of("llama"),
    )
    if through == "checkpointing":
        checkpointed(model, reentrant=False)
    loss_of(model.train(), inputs).backward()
    expected = answer(model, inputs)
    graph = 2 * torch.ones(1, 24, requires_grad=True)
    model.get_submodule("model.layers.0.mlp.gate_proj")(graph)  # noted, and never read
    twin = pickle.loads(pickle.dumps(model)) if through == "pickling" else copy.deepcopy(model)
    assert torch.equal(answer(twin, inputs), expected)
    assert not torch.equal(answer(moved(twin, 3), inputs), expected)
    assert differences(tensors(fresh("llama")), tensors(detach(twin))) == []
    assert torch.equal(answer(model, inputs), expected)


def test_named_layers_and_what_is_read_for_each_are_the_ones_that_are_found(tmp_path):
    found = moved(Adapter(placement="parallel", bottleneck=3).attach(fresh("bert")))
    method = Adapter(
        placement="parallel", bottleneck=3, target_modules=r"bert\.encoder\.layer\.\d\.output\.dense",
        input_modules=r".*intermediate\.dense",
    )  # fmt: skip
    named = moved(method.attach(fresh("bert")))
    assert torch.equal(answer(named, batch_of("bert")), answer(found, batch_of("bert")))
    save(named, tmp_path)
    again = load(fresh("bert"), tmp_path)
    assert torch.equal(answer(again, batch_of("bert")), answer(found, batch_of("bert")))


def test_reading_what_was_not_called_is_an_error_and_not_an_old_value():
    model = nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)})
    Adapter(placement="parallel", bottleneck=2, target_modules=("down",), input_modules=("up",)).attach(model)
    x = torch.randn(3, 4)
    model["down"](model["up"](x))
    with pytest.raises(RuntimeError, match="reads the input of 'up', which wasn't called before"):
        model["down"](torch.randn(3, 6))


# ---- refusals


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"bottleneck": 25}, r"bottleneck is 25, but 'model.*' gives 24 features: it must be at most 24"),
        ({"bottleneck": 3, "target_modules": ("wrong",)}, "this model has no 'wrong'.*It has: .*down_proj"),
        ({"bottleneck": 3, "skip_blocks": (0, 2)}, r"no adapted layer is in a block 2; there are \[0, 1\]"),
        ({"bottleneck": 3, "skip_blocks": (0, 1)}, "nothing is chosen"),
        ({"bottleneck": 3, "modules_to_save": ("down_proj",)}, "is a target and part of"),
        (
            {"bottleneck": 3, "placement": "parallel", "target_modules": ("down_proj",)}
            | {"input_modules": ("q_proj", "up_proj")},
            "target_modules finds 2 layers and input_modules 4",
        ),
        (
            {"bottleneck": 3, "placement": "parallel", "target_modules": ("norm",), "input_modules": ("q_proj",)},
            "it is a LlamaRMSNorm, not",
        ),
        ({"bottleneck": 3, "target_modules": ("mlp",)}, "it is a LlamaMLP, not"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_and_changes_nothing(fields, says):
    model = tiny_model("llama")
    before = picture(model)
    with pytest.raises(ValueError, match=says):
        Adapter(**fields).attach(model)
    assert differences(before, picture(model)) == []


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"placement": "before"},
            "placement is 'before'; it must be one of 'houlsby', 'pfeiffer', 'parallel'",
        ),
        ({"activation": "step"}, "activation is 'step'; it must be one of"),
        ({"bottleneck": 0}, "bottleneck is 0; it must be a whole number"),
        ({"scaling": 0.0}, "scaling is 0.0; it must be a number > 0"),
        ({"init_std": math.inf}, "init_std is inf"),
        ({"skip_blocks": "01"}, "skip_blocks is '01'; it must be numbers of blocks"),
        ({"placement": "parallel", "target_modules": ("a",)}, "give both or neither"),
        ({"input_modules": ("a",)}, "otherwise leave it out"),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_once(fields, says):
    with pytest.raises(ValueError, match=says):
        Adapter(**fields)


def test_a_file_whose_bottleneck_is_another_is_refused(tmp_path):
    save(Adapter(bottleneck=3).attach(fresh("bert")), tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes().replace(b'\\"bottleneck\\": 3', b'\\"bottleneck\\": 4'))
    (tmp_path / "adapter.json").unlink()
    model = fresh("bert")
    before = picture(model)
    with pytest.raises(ValueError, match=r"has the shape \(3, 24\), not \(4, 24\)"):
        load(model, tmp_path)
    assert differences(before, picture(model)) == []
    assert attached(model) == {}


def test_next_to_half_precision_the_projections_are_float32():
    model = Adapter(bottleneck=3).attach(tiny_model("llama", dtype=torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert answer(model, batch_of("llama")).dtype == torch.bfloat16


assert set(SUBLAYERS) >= set(TEXTS)


def test_a_norm_whose_forward_was_replaced_is_refused():
    """What a device hook, say, has put into the object's place would never ask the adapter."""
    layer = nn.LayerNorm(6)
    layer.forward = layer.forward
    with pytest.raises(ValueError, match="its forward was replaced on the object"):
        Adapter(bottleneck=2, target_modules=("0",)).attach(nn.Sequential(layer))
