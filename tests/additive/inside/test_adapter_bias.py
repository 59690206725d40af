"""AdapterBias against its formula in hooks, against dense autograd of the merged weight, and its published count."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from pefttutor import AdapterBias, as_lora, memory, merge, trainable
from tests.cases import answer, base_answer, batch_of, fresh, gradients, loss_of, moved
from tests.memory.models import TARGET_LENGTH, held
from tests.memory.models import batch_of as batch_for_memory
from tests.memory.models import model_of as model_for_memory
from tests.pictures import differences, picture, tensors
from tests.tiny import Quantised, tiny_batch, tiny_model

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-11}
ENDS = {  # of the feed-forwards: what their last layer is called, and how many there are
    "llama": ("mlp.down_proj", 2),
    "gpt2": ("mlp.c_proj", 2),
    "bert": ("output.dense", 2),
    "t5": ("DenseReluDense.wo", 4),
    "vit": ("mlp.fc2", 2),
}


@pytest.mark.parametrize("kind", ENDS)
def test_outputs_and_every_gradient_are_those_of_the_formula(kind):
    """h ← h + (w · x + b) v, token by token, in hooks of our own."""
    ours, inputs = (
        moved(AdapterBias().attach(tiny_model(kind, dtype=F64))),
        tiny_batch(kind, side="left", dtype=F64),
    )
    leaves = {n: p.detach().clone().requires_grad_() for n, p in ours.named_parameters() if p.requires_grad}
    layers: dict[str, dict[str, Tensor]] = {}
    for name, leaf in leaves.items():
        path, _, key = name.rpartition(".adapterbias_")
        layers.setdefault(path, {})[key] = leaf
    end, count = ENDS[kind]
    assert len(layers) == count
    assert all(path.endswith(end) and "attention" not in path for path in layers)

    def shift(w: dict[str, Tensor], layer: nn.Module, args: tuple[Tensor], h: Tensor) -> Tensor:
        length = (args[0] * w["w"]).sum(-1, keepdim=True) + w.get("b", 0.0)
        return h + length * w["v"]

    base = tiny_model(kind, dtype=F64)
    for path, w in layers.items():
        assert ("b" in w) is (base.get_submodule(path).bias is not None)
        base.get_submodule(path).register_forward_hook(functools.partial(shift, w))
    torch.testing.assert_close(answer(ours, inputs), answer(base, inputs), **EXACT)
    expected = dict(
        zip(leaves, torch.autograd.grad(loss_of(base, inputs), list(leaves.values())), strict=True)
    )
    found = gradients(ours, loss_of(ours, inputs))
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert grad.abs().max() > 1e-8, f"{name}: a gradient of zero would prove nothing"
        torch.testing.assert_close(grad, expected[name], **EXACT, msg=name)


@pytest.mark.parametrize("kind", ENDS)
def test_merged_it_is_a_change_of_rank_one_and_of_the_bias(kind):
    ours, inputs = moved(AdapterBias().attach(tiny_model(kind, dtype=F64))), tiny_batch(kind, dtype=F64)
    said, base = answer(ours, inputs), tiny_model(kind, dtype=F64)
    merge(ours)
    torch.testing.assert_close(answer(ours, inputs), said, **EXACT)
    paths = [name.rpartition(".")[0] for name in trainable(ours) if name.endswith("adapterbias_w")]
    for path in paths:
        layer, before = ours.get_submodule(path), base.get_submodule(path)
        change = layer.weight - before.weight
        assert torch.linalg.matrix_rank(change.detach(), rtol=1e-8) == 1
        dense = torch.outer(layer.adapterbias_v, layer.adapterbias_w)
        torch.testing.assert_close(change, dense.t() if kind == "gpt2" else dense, **EXACT)
        if before.bias is not None:
            torch.testing.assert_close(
                layer.bias - before.bias, layer.adapterbias_b * layer.adapterbias_v, **EXACT
            )


def test_the_count_for_bert_base_is_the_closed_formula():
    """768 + 3,072 + 1 a block (Fu et al., section 3), and the norms that the authors' code trains beside them."""
    with torch.device("meta"):
        model = hf.BertModel(hf.BertConfig())
    assert AdapterBias(target_modules=r".*\.\d+\.output\.dense").count(model) == 12 * 3_841 == 46_092
    norms = ("embeddings.LayerNorm", *(f"layer.{i}.output.LayerNorm" for i in range(12)))
    assert AdapterBias(modules_to_save=norms).count(model) == 46_092 + 18_432 + 1_536 == 66_060


def test_it_starts_as_the_base_and_v_alone_gets_a_gradient():
    model, inputs = AdapterBias().attach(fresh("bert")), batch_of("bert")
    assert torch.equal(answer(model, inputs), base_answer("bert"))
    found = gradients(model, loss_of(model, inputs))
    assert {name[-1]: bool(g.any()) for name, g in found.items()} == {"w": False, "v": True, "b": False}
    drawn = torch.cat([p.flatten() for name, p in model.named_parameters() if name.endswith("_w")])
    assert 0.9 / 40**0.5 < drawn.abs().max() <= 1 / 40**0.5


def test_a_seed_fixes_the_start_and_another_one_gives_another():
    one, same, other = (tensors(AdapterBias(init_seed=i).attach(fresh("gpt2"))) for i in (1, 1, 2))
    assert differences(one, same) == []
    changed = differences(one, other)
    assert changed
    assert all(name.endswith(("_w", "_b")) for name in changed)


def test_it_is_a_lora_of_rank_one_where_there_is_no_bias():
    model, inputs = moved(AdapterBias().attach(tiny_model("llama", dtype=F64))), tiny_batch("llama")
    said = answer(model, inputs)
    assert max(as_lora(model, r=1).values()) < 1e-6
    torch.testing.assert_close(answer(model, inputs), said, rtol=1e-5, atol=1e-6)


def test_a_quantised_layer_is_shifted_beside_and_not_merged():
    layer = Quantised(nn.Linear(6, 5))
    model, x = moved(AdapterBias(target_modules=("0",)).attach(nn.Sequential(layer))), torch.randn(3, 6)
    w, b, v = (model[0].get_parameter(f"adapterbias_{key}") for key in "wbv")
    torch.testing.assert_close(model(x), x @ layer.dense_weight().t() + layer.bias + (x @ w + b)[:, None] * v)
    with pytest.raises(ValueError, match="quantised"):
        merge(model)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("llama", torch.float32), ("gpt2", torch.float32), ("bert", torch.bfloat16), ("t5", torch.float32)],
)
def test_what_a_step_keeps_for_it_is_estimated(kind, dtype):
    model = model_for_memory(kind, dtype=dtype)
    options = {"batch_size": 2, "sequence_length": 24, "target_length": TARGET_LENGTH, "attention": "eager"}
    estimated = memory.estimate(model, AdapterBias(), **options, device="cpu")
    AdapterBias().attach(model)
    assert estimated.trained == sum(trainable(model).values()) == AdapterBias().count(model)
    measured = held(model, batch_for_memory(kind, 2, 24, dtype))
    assert sum(estimated.activations.values()) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"target_modules": ("wrong",)}, "target_modules: this model has no 'wrong'"),
        ({"target_modules": ("embed_tokens",)}, "can't be adapted: its input is words"),
        ({"target_modules": ("norm",)}, "it is a LlamaRMSNorm, not"),
        ({"init_seed": -1}, "init_seed is -1; it must be a whole number ≥ 0"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(fields, says):
    model = tiny_model("llama")
    before = picture(model)
    with pytest.raises(ValueError, match=says):
        AdapterBias(**fields).attach(model)
    assert differences(before, picture(model)) == []
