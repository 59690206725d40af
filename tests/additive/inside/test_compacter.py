"""Compacter against the library `adapters` (stored results), against torch.kron, and against its published counts."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor import AdapterFusion, Compacter, attached, load, memory, save, switch, trainable
from tests.additive.inside.adapters_library import FILE, PRODUCTS, model_of, value_of
from tests.cases import answer, base_answer, batch_of, fresh, gradients, moved
from tests.memory.models import TARGET_LENGTH, held
from tests.memory.models import batch_of as batch_for_memory
from tests.memory.models import model_of as model_for_memory
from tests.pictures import differences, picture, tensors
from tests.tiny import checkpointed, tiny_model

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-11}

# ---- the library


def method_of(case: str) -> Compacter:
    n, r = PRODUCTS[case.partition("-")[2]]
    plus_plus = case.endswith("plus-plus")
    placement = "pfeiffer" if plus_plus else "houlsby"
    return Compacter(bottleneck=4, n=n, r=r, placement=placement, train_norms=not plus_plus)


def our_name(case: str, theirs: str) -> str:
    """A parameter's name here, by the library's."""
    if theirs == "shared_parameters.a.phm_rule":
        return "compacter_A"
    host, inside, key = theirs.partition(".adapters.a.adapter_")
    if not inside:
        return theirs
    if case.startswith("bert"):
        host += ".dense"
    for named, place in {
        "attention_adapters": "self_attn.o_proj",
        "output_adapters": "mlp.down_proj",
    }.items():
        host = host.replace(named, place)
    which, _, key = key.replace("down.0.", "down.").partition(".")
    return f"{host}.compacter_{which}_{ {'W_left': 'S', 'W_right': 'T', 'b': 'bias'}[key] }"


@pytest.mark.parametrize("case", [f"{kind}-{name}" for kind in ("bert", "llama") for name in PRODUCTS])
def test_outputs_and_every_gradient_are_those_of_the_library(case):
    stored, kind = load_file(FILE), case.split("-")[0]
    model = model_of(kind)
    weights = dict(model.named_parameters())
    for name, p in weights.items():
        p.data.copy_(stored[f"{kind}/{name}"])
    method_of(case).attach(model)
    found = {name.removeprefix(f"{case}/"): t for name, t in stored.items() if name.startswith(f"{case}/")}
    theirs = {n.removeprefix("value/"): t for n, t in found.items() if n.startswith("value/")}
    assert set(trainable(model)) - set(weights) == {our_name(case, name) for name in theirs}
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


@pytest.mark.parametrize(("n", "r"), [(1, 3), (2, 2), (4, 1)])
def test_the_matrices_are_sums_of_kronecker_products(n, r):
    """W holds a multiple of Sᵢ Tᵢ for each entry of Aᵢ: outputs and gradients, by matrices made with torch.kron."""
    model = nn.ModuleDict({"down": nn.Linear(6, 8, dtype=F64)})
    moved(Compacter(bottleneck=4, n=n, r=r, activation="tanh", target_modules=("down",)).attach(model))
    x = torch.randn(2, 3, 6, dtype=F64)
    w = {name.rpartition("compacter_")[2]: p for name, p in model.named_parameters() if p.requires_grad}

    def matrix(which: str) -> Tensor:
        return sum(torch.kron(w["A"][i], w[f"{which}_S"][i] @ w[f"{which}_T"][i]) for i in range(n))

    h = F.linear(x, model.down.weight, model.down.bias)
    expected = h + torch.tanh(h @ matrix("down") + w["down_bias"]) @ matrix("up") + w["up_bias"]
    found = model.down(x)
    torch.testing.assert_close(found, expected, **EXACT)
    weights = torch.linspace(-1, 1, found.numel(), dtype=F64).view_as(found)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), list(w.values())) for y in (found, expected))
    torch.testing.assert_close(ours, theirs, **EXACT)
    assert all(g.abs().max() > 1e-6 for g in ours)
    assert torch.linalg.matrix_rank(matrix("down")) <= min(8, 4)


# ---- the start, and the count


def test_it_starts_so_near_the_base_that_float32_hardly_knows():
    """A is 10⁻⁴, and an adapter is a product of two such matrices: 10⁻⁸ of what it reads."""
    for dtype, least in ((torch.float32, 0.0), (F64, 1e-12)):
        base, inputs = answer(fresh("bert", dtype), batch_of("bert")), batch_of("bert")
        near = Compacter(bottleneck=4, n=2).attach(fresh("bert", dtype))
        distance = (answer(near, inputs) - base).norm() / base.norm()
        assert least <= distance < 1e-6
    model = nn.ModuleDict({"down": nn.Linear(4, 96)})
    drawn = dict(Compacter(bottleneck=64, n=8, target_modules=("down",)).attach(model).named_parameters())
    assert drawn["compacter_A"].std().item() == pytest.approx(1e-4, rel=0.1)
    S, T = drawn["down.compacter_down_S"], drawn["down.compacter_down_T"]
    for factor, rows, columns in ((S, 96 // 8, 1), (T, 1, 64 // 8)):
        bound = (6 / (rows + columns)) ** 0.5
        assert 0.9 * bound < factor.abs().max() <= bound
    assert not any(p.any() for name, p in drawn.items() if name.endswith("compacter_up_bias"))


def test_a_seed_fixes_the_start_and_another_one_gives_another():
    one, same, other = (
        tensors(Compacter(bottleneck=4, n=2, init_seed=i).attach(fresh("gpt2"))) for i in (1, 1, 2)
    )
    assert differences(one, same) == []
    changed = differences(one, other)
    assert changed
    assert all(name.endswith(("_A", "_S", "_T")) for name in changed)


@pytest.mark.parametrize(
    ("published", "share", "settings"),
    [
        (161_728, 0.073, {"target_modules": ("SelfAttention.o", "wo")}),
        (104_704, 0.047, {"placement": "pfeiffer"}),
    ],
)
def test_the_counts_for_t5_base_are_the_published_ones(published, share, settings):
    """Karimi Mahabadi et al., table 1, with the 62 norms: Compacter 0.073 % of T5-base, and Compacter++ 0.047 %."""
    sizes = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    with torch.device("meta"):
        model = hf.T5ForConditionalGeneration(hf.T5Config(**sizes))
    method = Compacter(train_norms=True, **settings)
    assert method.count(model) == published
    assert round(100 * published / sum(p.numel() for p in model.parameters()), 3) == share
    with torch.device("meta"):
        assert sum(trainable(memory.meta.with_method(method, model)).values()) == published


# ---- beside others


def test_two_rules_stand_side_by_side_and_each_acts_alone(tmp_path):
    model, said = fresh("bert"), {}
    for seed, name in enumerate("ab"):
        Compacter(bottleneck=4, n=2, target_modules=r".*\.output\.dense").attach(model, name=name)
        said[name] = answer(moved(switch(model, name), seed), batch_of("bert"))
    for name in "ab":
        assert torch.equal(answer(switch(model, name), batch_of("bert")), said[name])
        save(model, tmp_path / name, name=name)
        again = load(fresh("bert"), tmp_path / name)  # the pattern's layers are read from the tensors' names
        assert torch.equal(answer(again, batch_of("bert")), said[name])
    assert torch.equal(answer(switch(model), batch_of("bert")), base_answer("bert"))


def test_they_can_be_fused_as_other_adapters():
    """With one adapter all attention is on it, and V starts at I: the fusion is that adapter."""
    model = moved(Compacter(bottleneck=4, n=2, placement="pfeiffer").attach(fresh("bert"), name="a"))
    said = answer(model, batch_of("bert"))
    AdapterFusion(adapters=("a",)).attach(model)
    assert attached(model)["a"].active is False
    torch.testing.assert_close(answer(model, batch_of("bert")), said, rtol=1e-6, atol=1e-6)
    assert all("fusion_" in name for name in trainable(model))


# ---- memory, and refusals


@pytest.mark.parametrize(
    ("kind", "checkpointing", "dtype"),
    [
        ("llama", False, torch.float32),
        ("llama", True, torch.float32),
        ("bert", False, torch.bfloat16),
        ("t5", False, torch.float32),
    ],
)
def test_what_a_step_keeps_for_it_is_estimated(kind, checkpointing, dtype):
    model, method = model_for_memory(kind, dtype=dtype), Compacter(bottleneck=16)
    options = {"batch_size": 2, "sequence_length": 24, "target_length": TARGET_LENGTH, "attention": "eager"}
    estimated = memory.estimate(model, method, **options, device="cpu", gradient_checkpointing=checkpointing)
    method.attach(model)
    if checkpointing:
        checkpointed(model, reentrant=True)
    assert estimated.trained == sum(trainable(model).values()) == method.count(model)
    measured = held(model, batch_for_memory(kind, 2, 24, dtype))
    assert sum(estimated.activations.values()) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"bottleneck": 7}, "bottleneck is 7 and n is 4; n must divide it, such as bottleneck=24"),
        ({"n": 5, "bottleneck": 5}, r"n is 5, and 'model.layers.0.self_attn.o_proj' gives 24 features: n must divide"),
        ({"bottleneck": 28}, "bottleneck is 28, but .* gives 24 features: it must be at most 24"),
        ({"target_modules": ("wrong",)}, "target_modules: this model has no 'wrong'"),
        ({"target_modules": ("mlp",)}, "it is a LlamaMLP, not"),
        ({"placement": "parallel"}, "placement is 'parallel'; it must be one of 'houlsby', 'pfeiffer'"),
        ({"init_std": 0}, "init_std is 0; it must be a number > 0"),
        ({"r": 0}, "r is 0; it must be a whole number ≥ 1"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_and_changes_nothing(fields, says):
    model = tiny_model("llama")
    before = picture(model)
    with pytest.raises(ValueError, match=says):
        Compacter(**({"bottleneck": 4} | fields)).attach(model)
    assert differences(before, picture(model)) == []
