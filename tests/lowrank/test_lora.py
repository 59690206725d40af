"""LoRA against HF PEFT with the same weights, against plain PyTorch, and against its own closed formulas."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from pefttutor import LoRA, freeze, merge, trainable, unmerge
from pefttutor.method import merged
from pefttutor.parts.layer_change import AdaptedLayer
from pefttutor.parts.lowrank_layer import draw_factors
from tests.lowrank.peers import assert_same_as_peft, lora_config, with_peft
from tests.tiny import checkpointed

F64 = torch.float64


# ---- HF PEFT ----


@pytest.mark.parametrize("side", ["right", "left"])
def test_outputs_and_every_gradient_are_those_of_peft(tiny, batch, kind, targets, side):
    ours = LoRA(r=3, lora_alpha=7, target_modules=targets)
    inputs = batch(kind, side=side, dtype=F64)
    assert_same_as_peft(tiny(kind, dtype=F64), ours, lora_config(ours), inputs)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")),
        ("gpt2", ("c_attn", "c_proj", "c_fc")),
        ("llama", ("embed_tokens", "v_proj")),
        ("gpt2", ("wte", "wpe")),
        ("bert", ("word_embeddings", "dense")),
    ],
)
def test_all_kinds_of_layers_are_those_of_peft(tiny, batch, kind, names):
    ours = LoRA(r=2, lora_alpha=5, target_modules=names)
    assert_same_as_peft(tiny(kind, dtype=F64), ours, lora_config(ours), batch(kind, dtype=F64))


@pytest.mark.parametrize(("kind", "heads"), [("bert", ("classifier",)), ("llama", ("lm_head",))])
def test_a_head_that_trains_fully_is_that_of_peft(tiny, batch, kind, heads):
    names = {"bert": ("query",), "llama": ("q_proj",)}[kind]
    ours = LoRA(r=2, lora_alpha=5, target_modules=names, modules_to_save=heads)
    assert_same_as_peft(tiny(kind, dtype=F64), ours, lora_config(ours), batch(kind, dtype=F64))


def test_rslora_scales_as_peft_does(tiny, batch):
    ours = LoRA(r=5, lora_alpha=7, use_rslora=True)
    assert ours.scaling == pytest.approx(7 / math.sqrt(5))
    assert_same_as_peft(tiny("llama", dtype=F64), ours, lora_config(ours), batch("llama"))


def test_the_same_draws_give_the_dropout_of_peft(tiny, batch, redraw):
    ours = LoRA(r=3, lora_dropout=0.4)
    model = tiny("llama", dtype=F64)
    adapted = redraw(ours.attach(copy.deepcopy(model))).train()
    theirs, parameters = with_peft(model, lora_config(ours))
    for name, parameter in adapted.named_parameters():
        parameters[name].data.copy_(parameter.data)
    results = []
    for one in (adapted, theirs.train()):
        torch.manual_seed(3)
        results.append(one(**batch("llama")).logits)
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    plain = adapted.eval()(**batch("llama")).logits
    assert (plain - results[0]).abs().max() > 1e-3


# ---- what every method must hold (methods.md 2.0) ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attaching_changes_no_bit_of_the_output(tiny, batch, kind, targets, dtype):
    model, inputs = tiny(kind, dtype=dtype), batch(kind, dtype=dtype)
    # With gradients on, PyTorch picks another kernel for x Wᵀ when x needs one, here in T5's own layers.
    with torch.no_grad():
        before = model(**inputs).logits
        LoRA(target_modules=targets).attach(model)
        assert torch.equal(model(**inputs).logits, before)


def test_an_adapted_embedding_starts_as_it_was(tiny, batch):
    model, inputs = tiny("llama"), batch("llama")
    before = model(**inputs).logits
    LoRA(target_modules=("embed_tokens",)).attach(model)
    assert torch.equal(model(**inputs).logits, before)


def test_exactly_the_factors_train(tiny, kind, targets):
    model = tiny(kind)
    sizes = {n: m.weight.shape for n, m in model.named_modules() if n.rpartition(".")[2] in targets}
    names = list(model.state_dict())
    method = LoRA(r=3, target_modules=targets)
    method.attach(model)
    assert set(trainable(model)) == {f"{name}.lora_{x}" for name in sizes for x in "AB"}
    assert sum(trainable(model).values()) == sum(3 * (i + o) for i, o in sizes.values())
    assert method.count(model) == method.count(tiny(kind)) == sum(trainable(model).values())
    assert [name for name in model.state_dict() if "lora_" not in name] == names


OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1),
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ten_steps_leave_every_frozen_bit_alone(tiny, batch, kind, targets, optimizer):
    model, inputs = tiny(kind), batch(kind)
    model(**inputs).loss.backward()  # gradients from before must not count either
    LoRA(r=2, target_modules=targets).attach(model).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step = OPTIMIZERS[optimizer](model.parameters())
    losses = []
    for _ in range(10):
        loss = model(**inputs).loss
        loss.backward()
        step.step()
        step.zero_grad()
        losses.append(loss.item())
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert moved == set(trainable(model))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("config", "settings", "targets", "published"),
    [
        ("BertConfig", {}, ("query", "value"), 294_912),  # LoRA paper, RoBERTa-base: "0.3 M"
        (
            "T5Config",
            {"d_model": 2048, "num_heads": 32, "num_layers": 24},
            ("q", "v"),
            4_718_592,
        ),  # T0_3B: 19 MB
        (
            "T5Config",
            {"d_model": 1024, "num_heads": 16, "num_layers": 24},
            ("q", "v"),
            2_359_296,
        ),  # mt0-large
    ],
)
def test_counts_are_the_published_ones_without_any_weights(config, settings, targets, published):
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(getattr(transformers, config)(**settings))
    assert LoRA(r=8, target_modules=targets).count(model) == published
    assert sum(trainable(LoRA(r=8, target_modules=targets).attach(model)).values()) == published


# ---- initialisation ----


def test_a_starts_like_a_linear_layer_and_b_at_zero():
    model = LoRA(r=64, target_modules=("0",)).attach(nn.Sequential(nn.Linear(400, 300)))
    A, bound = model[0].lora_A.detach(), 1 / math.sqrt(400)
    assert not model[0].lora_B.any()
    assert 0.99 * bound < A.abs().max() <= bound
    assert A.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)  # of a uniform draw
    assert abs(A.mean()) < 0.02 * bound


def test_an_embedding_starts_the_other_way_round():
    model = LoRA(r=64, target_modules=("0",)).attach(nn.Sequential(nn.Embedding(500, 300)))
    assert not model[0].lora_A.any()
    assert model[0].lora_B.detach().std() == pytest.approx(1, rel=0.02)


def test_the_seed_alone_decides_the_draw(tiny):
    state = torch.get_rng_state()
    models = [LoRA(init_seed=seed).attach(tiny("llama")) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    one, again, other = [dict(model.named_parameters()) for model in models]
    names = [name for name in one if name.endswith("lora_A")]
    assert all(torch.equal(one[name], again[name]) for name in names)
    assert not any(torch.equal(one[name], other[name]) for name in names)
    assert not torch.equal(one[names[0]], one[names[2]])  # layers differ from each other


def test_factors_next_to_half_precision_weights_are_float32(tiny, batch):
    model = LoRA().attach(tiny("llama", dtype=torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model(**batch("llama")).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.lora_B.grad.dtype == torch.float32


# ---- dropout ----


def test_dropout_is_on_the_low_rank_branch_only_and_keeps_the_mean():
    model = nn.Sequential(nn.Linear(50, 4))
    layer = copy.deepcopy(model)
    LoRA(r=2, lora_alpha=2, lora_dropout=0.25, target_modules=("0",)).attach(model).train()
    model[0].lora_A.data.fill_(1.0)
    model[0].lora_B.data.fill_(1.0)
    x = torch.ones(4000, 50)
    torch.manual_seed(0)
    added = model(x) - layer(x)  # 2 · sum of 50 inputs, each 0 or 1 / 0.75
    assert added.mean().item() == pytest.approx(100, rel=0.01)
    assert added.std().item() == pytest.approx(2 * math.sqrt(50 * 0.25 / 0.75), rel=0.05)
    torch.testing.assert_close(model.eval()(x) - layer(x), torch.full((4000, 4), 100.0))


# ---- merging ----


@pytest.mark.parametrize("side", ["right", "left"])
def test_merged_is_unmerged(tiny, batch, redraw, kind, targets, side):
    model, inputs, method = tiny(kind), batch(kind, side=side), LoRA(r=3, target_modules=targets)
    plain = model(**inputs).logits
    redraw(method.attach(model))
    adapted = model(**inputs).logits
    assert (adapted - plain).abs().max() > 1e-3
    base = {name: parameter for name, parameter in model.named_parameters() if "lora_" not in name}
    values = {name: parameter.clone() for name, parameter in base.items()}
    names = list(model.state_dict())

    assert merge(model) is model
    torch.testing.assert_close(model(**inputs).logits, adapted, rtol=1e-4, atol=2e-6)
    assert list(model.state_dict()) == names
    unmerge(model)
    assert torch.equal(model(**inputs).logits, adapted)
    for name, parameter in model.named_parameters():
        if name in base:
            assert parameter is base[name]
            assert torch.equal(parameter, values[name])


def test_merging_into_bfloat16_rounds_once(redraw):
    layer = nn.Linear(64, 48, dtype=torch.bfloat16)
    method = LoRA(r=4, target_modules=("0",))
    model = redraw(method.attach(nn.Sequential(layer)))
    exact = layer.weight.double() + method.scaling * model[0].lora_B.double() @ model[0].lora_A.double()
    merge(model)
    assert model[0].weight.dtype == torch.bfloat16
    assert torch.equal(model[0].weight, exact.float().bfloat16())


def tied_llama(tiny):
    model = tiny("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_merging_a_tied_layer_changes_only_that_layer(tiny, batch, redraw, target):
    model, inputs, method = tied_llama(tiny), batch("llama"), LoRA(r=3, target_modules=(target,))
    shared = model.lm_head.weight
    redraw(method.attach(model))
    assert model.lm_head.weight is model.model.embed_tokens.weight is shared
    adapted = model(**inputs).logits
    merge(model)
    torch.testing.assert_close(model(**inputs).logits, adapted, rtol=1e-4, atol=2e-6)
    unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight is shared
    assert torch.equal(model(**inputs).logits, adapted)


def test_a_merged_model_can_be_copied_moved_and_unmerged(tiny, batch, redraw):
    model, inputs, method = tied_llama(tiny), batch("llama"), LoRA(target_modules=("embed_tokens", "q_proj"))
    redraw(method.attach(model))
    adapted = model(**inputs).logits
    other = copy.deepcopy(merge(model)).to(F64)
    unmerge(other)
    assert {p.dtype for p in other.parameters()} == {F64}
    assert other.lm_head.weight is other.model.embed_tokens.weight
    torch.testing.assert_close(other(**inputs).logits.float(), adapted, rtol=1e-4, atol=2e-6)
    assert merged(model)
    assert not merged(other)


def test_training_a_merged_model_is_refused(tiny, batch):
    model = merge(LoRA().attach(tiny("llama"))).train()
    with pytest.raises(RuntimeError, match="lora_B would learn nothing: unmerge"):
        model(**batch("llama"))
    with torch.no_grad():
        model(**batch("llama"))


def test_merging_twice_or_unmerging_a_plain_model_is_refused(tiny, batch, redraw):
    model, method = tiny("llama"), LoRA()
    with pytest.raises(RuntimeError, match="no method is attached to this model"):
        merge(model)
    redraw(method.attach(model))
    with pytest.raises(RuntimeError, match="isn't merged, so there is nothing to unmerge"):
        unmerge(model)
    merge(model)
    merged = model(**batch("llama")).logits
    with pytest.raises(RuntimeError, match="merged already: call unmerge"):
        merge(model)
    assert torch.equal(model(**batch("llama")).logits, merged)
    unmerge(model)


# ---- what must survive ----


def test_hooks_and_their_handles_survive():
    layer, calls = nn.Linear(6, 4), []
    handles = [
        layer.register_forward_pre_hook(lambda *a: calls.append("pre")),
        layer.register_forward_hook(lambda *a: calls.append("forward")),
        layer.register_full_backward_hook(lambda *a: calls.append("backward")),
    ]
    model = LoRA(r=2, target_modules=("0",)).attach(nn.Sequential(layer, nn.Linear(4, 1)))
    # Without a gradient of its own torch warns that the backward hook sees none.
    x = torch.randn(3, 6, requires_grad=True)
    model(x).sum().backward()
    assert calls == ["pre", "forward", "backward"]
    for handle in handles:
        handle.remove()
    model(torch.randn(3, 6)).sum().backward()
    assert len(calls) == 3


def test_device_dtype_and_training_flag_survive():
    model = nn.Sequential(nn.Linear(6, 4, dtype=F64), nn.Linear(4, 3, device="meta"))
    model[0].eval()
    weights = [layer.weight for layer in model]
    LoRA(r=2, target_modules=("0", "1")).attach(model)
    assert [layer.training for layer in model] == [False, True]
    assert [layer.weight is weight for layer, weight in zip(model, weights, strict=True)] == [True, True]
    assert model[0].lora_A.dtype == F64
    assert model[1].lora_A.device.type == model[1].lora_B.device.type == "meta"


def test_a_layer_in_two_places_stays_one_layer():
    layer = nn.Linear(5, 5)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    method = LoRA(r=2, target_modules=("b.0",))
    method.attach(model)
    assert isinstance(model["a"], AdaptedLayer)
    assert model["a"] is model["b"][0]
    assert sum(trainable(model).values()) == method.count(model) == 2 * 10


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_work_and_share_nothing(tiny, batch, redraw, kind, targets, duplicate):
    model, inputs = redraw(LoRA(target_modules=targets).attach(tiny(kind))), batch(kind)
    twin = duplicate(model)
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    redraw(twin, seed=5)
    assert not torch.equal(twin(**inputs).logits, model(**inputs).logits)
    assert trainable(twin) == trainable(model)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("order", ["before", "after"])
def test_checkpointing_gives_the_same_gradients(tiny, batch, redraw, kind, targets, reentrant, order):
    model, inputs = tiny(kind, dtype=F64).train(), batch(kind, dtype=F64)
    method = LoRA(target_modules=targets)
    plain = redraw(method.attach(copy.deepcopy(model)))
    plain(**inputs).loss.backward()
    if order == "before":
        checkpointed(model, reentrant=reentrant)
    redraw(method.attach(model))
    if order == "after":
        checkpointed(model, reentrant=reentrant)
    twin = copy.deepcopy(model)  # its hook must look at the copy
    for one in (model, twin):
        one(**inputs).loss.backward()
        expected = dict(plain.named_parameters())
        for name, parameter in one.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(
                    parameter.grad, expected[name].grad, rtol=1e-9, atol=1e-12, msg=name
                )


def test_without_checkpointing_nothing_below_the_first_factor_needs_a_gradient(tiny, batch):
    model, seen = LoRA(target_modules=r"model\.layers\.1\..*q_proj").attach(tiny("llama")).train(), []
    model.model.layers[0].register_forward_hook(
        lambda module, args, output: seen.append(output.requires_grad)
    )
    model(**batch("llama")).loss.backward()
    assert seen == [False]


# ---- a bare module ----


def test_layers_are_the_plain_formula_with_any_shapes(redraw):
    size = st.integers(1, 9)

    @settings(max_examples=60, deadline=None)
    @given(
        n_in=size, n_out=size, lead=st.lists(st.integers(0, 3), max_size=3), bias=st.booleans(), d=st.data()
    )
    def check(n_in, n_out, lead, bias, d):
        r = d.draw(st.integers(1, min(n_in, n_out)))
        layer = nn.Linear(n_in, n_out, bias=bias, dtype=F64)
        method = LoRA(r=r, lora_alpha=3, target_modules=("0",))
        new = redraw(method.attach(nn.Sequential(layer)))[0]
        x = torch.randn(*lead, n_in, dtype=F64)
        expected = x @ (layer.weight + 3 / r * new.lora_B @ new.lora_A).T + (layer.bias if bias else 0)
        torch.testing.assert_close(new(x), expected)
        assert (
            method.count(nn.Sequential(layer))
            == new.lora_A.numel() + new.lora_B.numel()
            == r * (n_in + n_out)
        )

    check()


def test_an_embedding_is_the_plain_formula_and_keeps_its_padding_row(redraw):
    layer = nn.Embedding(11, 5, padding_idx=0, dtype=F64)
    method = LoRA(r=3, lora_alpha=4, target_modules=("0",))
    new = redraw(method.attach(nn.Sequential(layer)))[0]
    ids = torch.tensor([[0, 3, 3], [10, 0, 1]])
    table = layer.weight + (4 / 3 * new.lora_B @ new.lora_A).T
    torch.testing.assert_close(new(ids), table[ids])
    new(ids).sum().backward()
    assert not new.lora_A.grad[:, 0].any()
    assert new.lora_A.grad[:, 3].all()


# ---- bad input: a clear error before anything is changed ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r is 0; it must be a whole number"),
        ({"r": -2}, "r is -2"),
        ({"r": 2.5}, "r is 2.5"),
        ({"r": True}, "r is True"),
        ({"r": "8"}, "r is '8'"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"lora_dropout": None}, "lora_dropout is None"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan"),
        ({"lora_dropout": 1.0}, r"lora_dropout is 1.0; it must be a number ≥ 0 and < 1"),
        ({"lora_dropout": -0.1}, "lora_dropout is -0.1"),
        ({"init_seed": 0.5}, "init_seed is 0.5"),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"modules_to_save": "score"}, r"write \('score',\)"),
    ],
)
def test_impossible_hyperparameters_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**fields)


def scaled(n_in: int, n_out: int) -> nn.Module:
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    return Scaled(n_in, n_out)


def bare(**layers: nn.Module) -> nn.Module:
    return nn.ModuleDict({"fine": nn.Linear(6, 6), **layers})


def hooked() -> nn.Module:
    layer = nn.Linear(6, 6)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("fields", "layers", "message"),
    [
        ({"r": 4}, {"thin": nn.Linear(9, 3)}, "r is 4, but 'thin' maps 9 to 3: r must be at most 3"),
        ({"r": 4}, {"thin": nn.Embedding(3, 9)}, "r is 4, but 'thin' maps 3 to 9: r must be at most 3"),
        (
            {},
            {"thin": nn.LayerNorm(6)},
            "'thin' can't be adapted: it is a LayerNorm, not Conv1D, Embedding, Linear",
        ),
        (
            {},
            {"thin": scaled(6, 6)},
            "'thin' can't be adapted: it is a Scaled, which computes something else",
        ),
        ({}, {"thin": hooked()}, "'thin' can't be adapted: its forward was replaced"),
        ({}, {"thin": nn.Embedding(6, 6, max_norm=1.0)}, "'thin' can't be adapted: it has max_norm"),
        (
            {"modules_to_save": ("head",)},
            {"thin": nn.Linear(6, 6)},
            "modules_to_save: this model has no 'head'",
        ),
        (
            {"modules_to_save": ("head",), "target_modules": ("head.0",)},
            {"head": nn.Sequential(nn.Linear(6, 6))},
            "'head.0' is a target and part of 'head' in modules_to_save",
        ),
    ],
)
def test_a_layer_that_cannot_be_adapted_is_named_and_nothing_is_changed(fields, layers, message):
    model = bare(**layers)
    model["fine"].weight.grad = torch.ones(6, 6)
    before = {name: (id(module), type(module)) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        LoRA(**{"r": 2, "target_modules": ("fine", "thin"), **fields}).attach(model)
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())
    assert model["fine"].weight.grad is not None


def test_running_out_of_memory_in_the_middle_changes_nothing(tiny, monkeypatch):
    model, made = tiny("llama"), []

    def fail_at_the_third(layer, r, generator):
        made.append(layer)
        if len(made) == 3:
            raise MemoryError
        return draw_factors(layer, r, generator)

    monkeypatch.setattr("pefttutor.lowrank.lora.draw_factors", fail_at_the_third)
    with pytest.raises(MemoryError):
        LoRA().attach(model)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(module, AdaptedLayer) for module in model.modules())


def test_an_attention_that_reads_past_its_layer_is_refused():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    with pytest.raises(
        ValueError, match=r"'0\.self_attn\.out_proj' can't be adapted: it is a NonDynamically"
    ):
        LoRA(r=2, target_modules=("out_proj",)).attach(model)
    with pytest.raises(
        ValueError, match=r"reads its weight without calling it.*set_fastpath_enabled\(False\)"
    ):
        LoRA(r=2, target_modules=("linear1",)).attach(model)


def test_a_model_that_peft_has_adapted_is_not_adapted_again(tiny):
    theirs, _ = with_peft(tiny("llama"), lora_config(LoRA()))
    with pytest.raises(
        ValueError, match=r"q_proj' can't be adapted: it is a peft\.tuners\.lora\.layer\.Linear"
    ):
        LoRA().attach(theirs)


def test_a_name_can_be_used_only_once(tiny):
    model = LoRA(r=2).attach(tiny("llama"))
    names = set(trainable(model))
    for again in (model, nn.Sequential(model)):
        with pytest.raises(ValueError, match=r"already adapted.*LoRA\(r=2.*detach|attached to the part '0'"):
            LoRA(target_modules=("k_proj",)).attach(again)
    assert set(trainable(model)) == names


def test_unknown_targets_list_what_exists_once(tiny, kind):
    with pytest.raises(ValueError, match="this model has no 'wrong'") as error:
        LoRA(target_modules=("wrong",)).attach(tiny(kind))
    last = {"llama": "down_proj", "gpt2": "c_fc", "bert": "query", "t5": "wo", "vit": "fc2"}[kind]
    assert str(error.value).count(f" {last}") == 1


@pytest.mark.parametrize(
    ("kind", "usual"),
    [("bert", r"\('query', 'value'\)"), ("gpt2", r"\('c_attn',\)"), ("t5", r"\('q', 'v'\)")],
)
def test_when_the_default_targets_do_not_exist_the_usual_ones_are_proposed(tiny, kind, usual):
    with pytest.raises(ValueError, match=f"no 'q_proj' and 'v_proj'.*Usual for it: {usual}"):
        LoRA().attach(tiny(kind))


def test_freezing_and_attaching_return_the_same_model(tiny):
    model = tiny("llama")
    assert LoRA().attach(freeze(model)) is model
    assert sum(isinstance(module, AdaptedLayer) for module in model.modules()) == 4
    assert not any(isinstance(m, AdaptedLayer) and isinstance(m, nn.Embedding) for m in model.modules())


@pytest.mark.parametrize(
    "layer",
    [nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), prune.identity(nn.Linear(6, 6), "weight")],
)
def test_a_weight_that_is_made_at_each_call_can_be_adapted_but_not_merged_into(layer):
    """Checked against W x + b + s · B A x with the weight that the layer has made."""
    model, x = nn.ModuleDict({"thin": layer}), torch.randn(3, 6)
    LoRA(r=2, target_modules=("thin",)).attach(model)
    nn.init.normal_(layer.lora_B)
    delta = 8 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), x @ (layer.weight + delta).T + layer.bias)
    with pytest.raises(ValueError, match="'thin' keeps its weight in a form that nothing can be added to"):
        merge(model)
