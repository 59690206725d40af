"""LoHa against HF PEFT with the same weights, and against the dense formula."""

from __future__ import annotations

import pytest
import torch
from peft import LoHaConfig
from torch import nn

from pefttutor import LoHa, attached, memory
from pefttutor.lowrank.loha import hadamard_factors
from pefttutor.widgets.spectrum import updates
from tests.lowrank.peers import assert_same_as_peft, drawn, with_linear_layers
from tests.memory.models import assert_estimate_is_measured, model_of
from tests.pictures import differences, picture
from tests.tiny import Quantised

F64, BF16 = torch.float64, torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "names"),
    [("llama", ("q_proj", "v_proj", "down_proj")), ("gpt2", ("c_attn",)), ("bert", ("query", "dense"))],
)
def test_outputs_and_every_gradient_are_those_of_peft(tiny, batch, kind, names):
    """With an s that is exact in float32, where HF PEFT keeps it; of GPT-2 it gets a copy with linear layers."""
    ours = LoHa(r=3, alpha=4.5, target_modules=names)
    config = LoHaConfig(r=3, alpha=4.5, target_modules=list(names))
    base, inputs = tiny(kind, dtype=F64), batch(kind, side="left", dtype=F64)
    assert_same_as_peft(base, ours, config, inputs, theirs_on=with_linear_layers(base))


def test_it_starts_as_that_of_peft_does():
    layer = nn.Linear(600, 400)
    model = LoHa(r=4, target_modules=("0",)).attach(nn.Sequential(layer))
    for key, columns in (("hada_w1_a", 4), ("hada_w1_b", 600), ("hada_w2_a", 4)):
        values = model[0].get_parameter(key)
        assert 0.99 * columns**-0.5 < values.abs().max() <= columns**-0.5
    assert not model[0].hada_w2_b.any()


@pytest.mark.parametrize("kind", ["Linear", "quantised"])
def test_it_is_the_dense_formula_of_rank_r_squared(kind):
    layer = nn.Linear(11, 10) if kind == "Linear" else Quantised(nn.Linear(11, 10))
    model, x = nn.Sequential(layer).double(), torch.randn(3, 11, dtype=F64)
    base = model(x)
    drawn(LoHa(r=3, alpha=6, target_modules=("0",)).attach(model), std=1.0)
    B1, A1, B2, A2 = (p.detach().double() for p in attached(model)["default"].trained())
    delta = 2 * (B1 @ A1) * (B2 @ A2)
    torch.testing.assert_close(model(x), base + x @ delta.T, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        attached(model)["default"].parts[0].delta().double(), delta, rtol=1e-6, atol=1e-6
    )
    assert torch.linalg.matrix_rank(delta) == 9
    assert (updates(model)["0"].sigma > 1e-6).sum() == 9


def test_the_factors_of_the_product_have_its_gradients():
    shapes = ((5, 2), (2, 6), (5, 2), (2, 6))
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator, dtype=F64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(hadamard_factors, given)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_estimate_is_what_autograd_keeps(kind, dtype):
    names = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn",)}[kind]
    method = LoHa(r=4, target_modules=names)
    estimated, _ = assert_estimate_is_measured(kind, method, dtype)
    assert estimated.adapter_weights == 4 * estimated.trained
    options = {"batch_size": 2, "sequence_length": 24, "attention": "eager", "device": "cpu"}
    with torch.no_grad():
        assert memory.estimate(model_of(kind, dtype=dtype), method, **options) == estimated


def test_what_it_refuses_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(6, 4), nn.Embedding(9, 6))
    before = picture(model)
    with pytest.raises(ValueError, match="r is 5, but '0' maps 6 to 4: r must be at most 4"):
        LoHa(r=5, target_modules=("0",)).attach(model)
    with pytest.raises(ValueError, match="'1' can't be adapted: LoHa takes no embedding"):
        LoHa(r=2, target_modules=("1",)).attach(model)
    with pytest.raises(ValueError, match="alpha is 0; it must be a number > 0"):
        LoHa(alpha=0)
    assert differences(before, picture(model)) == []
