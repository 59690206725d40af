"""LoKr against HF PEFT with the same weights, and against torch's Kronecker product."""

from __future__ import annotations

import pytest
import torch
from peft import LoKrConfig
from peft.tuners.lokr.layer import factorization
from torch import nn

from pefttutor import LoKr, attached, merge
from pefttutor.lowrank.lokr import factorised
from tests.lowrank.peers import assert_same_as_peft, drawn, with_linear_layers
from tests.memory.models import assert_estimate_is_measured
from tests.pictures import differences, picture

F64, BF16 = torch.float64, torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "names", "settings"),
    [
        ("llama", ("q_proj", "v_proj", "down_proj"), {"r": 2}),
        ("llama", ("q_proj",), {"r": 1, "decompose_both": True}),
        ("gpt2", ("c_attn",), {"r": 3, "decompose_factor": 2}),
        ("bert", ("query", "dense"), {"r": 8}),  # KronA
    ],
)
def test_outputs_and_every_gradient_are_those_of_peft(tiny, batch, kind, names, settings):
    """Of GPT-2 HF PEFT gets a copy with linear layers, and ours the model as it is."""
    ours = LoKr(alpha=5, target_modules=names, **settings)
    config = LoKrConfig(alpha=5, target_modules=list(names), **settings)
    base, inputs = tiny(kind, dtype=F64), batch(kind, side="left", dtype=F64)
    assert_same_as_peft(base, ours, config, inputs, theirs_on=with_linear_layers(base))


def test_sizes_are_factorised_as_peft_does_it():
    for size in range(1, 400):
        assert factorised(size) == factorization(size)
        for factor in [n for n in range(1, size + 1) if size % n == 0]:
            assert factorised(size, factor) == factorization(size, factor)


def test_the_counts_of_a_square_layer_of_768():
    """24 · 24 + 8 · (32 + 32), with both in rank 8, and the whole product; LoRA of rank 8 has 12,288."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(768, 768))
    for settings, values in (({}, 1_088), ({"decompose_both": True}, 896), ({"r": 16}, 1_600)):
        assert LoKr(**({"r": 8} | settings), target_modules=("0",)).count(model) == values


@pytest.mark.parametrize("settings", [{"r": 1}, {"r": 1, "decompose_both": True}, {"r": 9}])
def test_it_is_torchs_kronecker_product_and_merges(settings):
    model, x = nn.Sequential(nn.Linear(30, 24)).double().eval(), torch.randn(3, 30, dtype=F64)
    base = model(x)
    method = LoKr(alpha=3, target_modules=("0",), **settings)
    drawn(method.attach(model, name="it"), std=1.0)
    (part,) = attached(model)["it"].parts
    tensors = [p.detach() for p in part.trained()]
    if settings["r"] == 9:
        W1, W2 = tensors
    elif "decompose_both" in settings:
        W1, W2 = tensors[0] @ tensors[1], tensors[2] @ tensors[3]
    else:
        W1, W2 = tensors[0], tensors[1] @ tensors[2]
    delta = method.scaling * torch.kron(W1, W2)
    torch.testing.assert_close(part.delta(), delta)
    torch.testing.assert_close(model(x), base + x @ delta.T)
    ranks = [int(torch.linalg.matrix_rank(W)) for W in (delta, W1, W2)]
    assert ranks[0] == ranks[1] * ranks[2]
    torch.testing.assert_close(merge(model)(x), base + x @ delta.T)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("kind", "both"), [("llama", True), ("gpt2", False)])
def test_the_estimate_is_what_autograd_keeps(kind, both, dtype):
    names = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn",)}[kind]
    method = LoKr(r=3, decompose_both=both, target_modules=names)
    estimated, _ = assert_estimate_is_measured(kind, method, dtype)
    assert estimated.adapter_weights == 4 * estimated.trained


def test_what_it_refuses_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(12, 18), nn.Embedding(9, 6))
    before = picture(model)
    why = "decompose_factor is 4, which doesn't divide both sizes of '0', .* take one of 1, 2, 3, 6, or -1"
    with pytest.raises(ValueError, match=why):
        LoKr(decompose_factor=4, target_modules=("0",)).attach(model)
    with pytest.raises(ValueError, match=why):
        LoKr(decompose_factor=4, target_modules=("0",)).count(model)
    with pytest.raises(ValueError, match="'1' can't be adapted: LoKr takes no embedding"):
        LoKr(r=2, target_modules=("1",)).attach(model)
    for wrong in (0, -2, True, 1.5):
        with pytest.raises(
            ValueError, match=f"decompose_factor is {wrong}; it must be a whole number ≥ 1, or -1"
        ):
            LoKr(decompose_factor=wrong)
    assert differences(before, picture(model)) == []
