"""SLTrain against the dense formula, whose entries torch's own sparse tensors place, and against the paper's layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pefttutor import SLTrain, attached, merge, trainable
from pefttutor.parts.linear import sizes
from tests.formulas import sltrain
from tests.lowrank.peers import drawn, run
from tests.memory.models import assert_estimate_is_measured
from tests.pictures import differences, picture
from tests.tiny import Quantised

F64, BF16 = torch.float64, torch.bfloat16
KEYS = ("lora_A", "lora_B", "sltrain_values")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama", ("q_proj", "v_proj", "down_proj")),
        ("gpt2", ("c_attn",)),
        ("bert", ("query", "output.dense")),
    ],
)
def test_outputs_and_every_gradient_are_those_of_the_dense_formula(tiny, batch, kind, names):
    ours = SLTrain(r=2, lora_alpha=3, density=0.1, target_modules=names)
    base, inputs = tiny(kind, dtype=F64), batch(kind, side="left", dtype=F64)
    adapted, dense = drawn(ours.attach(copy.deepcopy(base))), copy.deepcopy(base)
    leaves = {}
    for part in attached(adapted)["default"].parts:
        layer = dense.get_submodule(part.path)
        places = {"sltrain_places": part.held("sltrain_places")}
        own = {key: part.held(key).detach().clone().requires_grad_() for key in KEYS}
        leaves |= {f"{part.path}.{key}": leaf for key, leaf in own.items()}

        def changed(layer, args, y, tensors=own | places):
            return y + args[0] @ sltrain(tensors, *sizes(layer), ours, dense).T

        layer.register_forward_hook(changed)
    torch.testing.assert_close(run(adapted, inputs), run(dense, inputs), rtol=1e-9, atol=1e-11)
    assert set(trainable(adapted)) == set(leaves)
    for name, leaf in leaves.items():
        assert leaf.grad.abs().max() > 1e-8
        torch.testing.assert_close(adapted.get_parameter(name).grad, leaf.grad, rtol=1e-9, atol=1e-11)
    assert sum(trainable(adapted).values()) == ours.count(base)


def test_beside_a_weight_of_zero_it_is_the_papers_layer():
    """W = s · B A + S and no other weight; A and S are drawn in ±1/√in, B is zero."""
    layer = nn.Linear(600, 400, bias=False).double()
    layer.weight.data.zero_()
    ours = SLTrain(r=4, lora_alpha=32, density=0.03, sparse_init="uniform", target_modules=("0",))
    model = ours.attach(nn.Sequential(layer))
    A, B, values, index = (getattr(model[0], key) for key in (*KEYS, "sltrain_places"))
    assert len(values) == len(set(index.tolist())) == int(0.03 * 600 * 400)
    for drawn_at_random in (A, values):
        assert 0.99 * 600**-0.5 < drawn_at_random.abs().max() <= 600**-0.5
    assert not B.any()
    drawn(model)
    W, x = 8 * B @ A, torch.randn(3, 600, dtype=F64)
    W.view(-1)[index.long()] += values
    torch.testing.assert_close(model(x), x @ W.T, rtol=1e-9, atol=1e-11)


def test_few_entries_bring_nearly_the_full_rank():
    """64 · 48, r = 4: the product has 448 values and rank 4, and 5 % more entries make it 46."""
    model = drawn(SLTrain(r=4, density=0.05, target_modules=("0",)).attach(nn.Sequential(nn.Linear(64, 48))))
    part = attached(model)["default"].parts[0]
    assert torch.linalg.matrix_rank(part.delta()) > 40
    part.held("sltrain_values").data.zero_()
    assert torch.linalg.matrix_rank(part.delta()) == 4


def test_places_are_those_of_the_seed_and_stay():
    models = [
        SLTrain(r=2, density=0.2, target_modules=("0",), init_seed=seed).attach(
            nn.Sequential(nn.Linear(12, 9))
        )
        for seed in (0, 0, 1)
    ]
    first, again, other = (model[0].sltrain_places for model in models)
    assert first.tolist() == again.tolist() != other.tolist()
    assert first.dtype == torch.int32
    assert "sltrain_places" in dict(models[0][0].named_buffers())


@pytest.mark.parametrize("kind", ["Linear", "quantised"])
def test_it_takes_layers_whose_weight_it_cannot_read_and_merges_the_others(kind):
    layer = nn.Linear(11, 10) if kind == "Linear" else Quantised(nn.Linear(11, 10))
    model, x = nn.Sequential(layer).double(), torch.randn(3, 11, dtype=F64)
    base = model(x)
    drawn(SLTrain(r=3, density=0.1, target_modules=("0",)).attach(model))
    expected = base + x @ attached(model)["default"].parts[0].delta().double().T
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    if kind == "Linear":
        torch.testing.assert_close(merge(model.eval())(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_estimate_is_what_autograd_keeps(kind, dtype):
    names = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn",)}[kind]
    assert_estimate_is_measured(kind, SLTrain(r=4, density=0.05, target_modules=names), dtype)


def test_what_it_refuses_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(6, 4), nn.Embedding(9, 6))
    before = picture(model)
    with pytest.raises(ValueError, match="r is 5, but '0' maps 6 to 4: r must be at most 4"):
        SLTrain(r=5, target_modules=("0",)).attach(model)
    with pytest.raises(ValueError, match="'1' can't be adapted: SLTrain takes no embedding"):
        SLTrain(r=2, target_modules=("1",)).attach(model)
    with pytest.raises(ValueError, match=r"density is 3; it must be in \(0, 1\]"):
        SLTrain(density=3)
    with pytest.raises(ValueError, match="sparse_init is 'zero'; it must be one of 'zeros', 'uniform'"):
        SLTrain(sparse_init="zero")
    assert differences(before, picture(model)) == []
