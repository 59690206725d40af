"""What counts as a linear layer: the known kinds, subclasses by proof, layers of other libraries; and its sizes."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from pefttutor import Adapter, LoRA, detach, merge, unmerge
from pefttutor.parts.linear import (
    all_linear,
    dense_weight,
    is_plain,
    sizes,
    stored_as,
    transposed,
    why_not_linear,
)
from tests.cases import moved
from tests.tiny import Quantised, tiny_model


class Scaled(nn.Linear):
    """It computes something else with its weight than it says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Shifted(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + 1


class Gated(nn.Linear):
    """It takes more than an input."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return gate * super().forward(x)


class Summed(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).sum(-1)


class Renamed(nn.Linear):
    """A subclass that computes the same, in other words."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight.mT) + (0 if self.bias is None else self.bias)


class Foreign(nn.Module):
    """A layer of another library, with a weight of another form, that doesn't say what it would be."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 4, 3
        self.register_buffer("qweight", torch.zeros(2, 3, dtype=torch.int32))


def made_of_others() -> nn.Module:
    layer = nn.Sequential(nn.Linear(4, 3))
    layer.in_features, layer.out_features = 4, 3
    return layer


def replaced() -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.forward = lambda x: x
    return layer


LINEAR = {
    "Linear": (nn.Linear(4, 3), (4, 3), True),
    "Linear without bias": (nn.Linear(4, 3, bias=False), (4, 3), True),
    "Conv1D": (Conv1D(3, 4), (4, 3), True),
    "Embedding": (nn.Embedding(7, 3), (7, 3), True),
    "Falcon's": (FalconLinear(4, 3), (4, 3), False),
    "in other words": (Renamed(4, 3), (4, 3), False),
    "in bfloat16": (Renamed(4, 3, dtype=torch.bfloat16), (4, 3), False),
    "normalised": (parametrizations.weight_norm(nn.Linear(4, 3)), (4, 3), False),
    "pruned": (prune.identity(nn.Linear(4, 3), "weight"), (4, 3), True),
    "Bart's, not scaled": (BartScaledWordEmbedding(7, 3, 0, embed_scale=1.0), (7, 3), False),
    "quantised": (Quantised(nn.Linear(4, 3)), (4, 3), False),
    "another library's": (Foreign(), (4, 3), False),
    "without values": (Renamed(4, 3, device="meta"), (4, 3), False),
}


@pytest.mark.parametrize("layer", LINEAR)
def test_what_computes_w_x_plus_b_is_taken(layer):
    layer, size, plain = LINEAR[layer]
    assert why_not_linear(layer) is None
    assert sizes(layer) == size
    assert is_plain(layer) is plain


NOT_LINEAR = {
    "scaled": (Scaled(4, 3), "it is a Scaled, which computes something else than W x \\+ b with its weight"),
    "Bart's, scaled": (
        BartScaledWordEmbedding(7, 3, 0, embed_scale=2.0),
        "it is a BartScaledWordEmbedding, which",
    ),
    "shifted": (Shifted(7, 3), "it is a Shifted, which computes something else"),
    "gated": (Gated(4, 3), r"it is a Gated, which doesn't take an input alone \(TypeError"),
    "summed": (Summed(4, 3), "it is a Summed, which gives something else than W x \\+ b"),
    "a norm": (
        nn.LayerNorm(3),
        "it is a LayerNorm, not Conv1D, Embedding, Linear or another layer with in_features",
    ),
    "a convolution": (nn.Conv1d(4, 3, 1), "it is a Conv1d, not"),
    "attention's own": (
        nn.MultiheadAttention(4, 2).out_proj,
        "NonDynamicallyQuantizableLinear, which nn.MultiheadA",
    ),
    "with max_norm": (nn.Embedding(7, 3, max_norm=1.0), "it has max_norm, which rewrites its weight"),
    "replaced": (replaced(), "its forward was replaced on the object"),
    "made of others": (made_of_others(), "it is a Sequential, made of other layers: name one of those"),
    "of whole numbers": (
        nn.Embedding.from_pretrained(torch.zeros(7, 3).int(), freeze=True),
        "no plain floating-point",
    ),
}


@pytest.mark.parametrize("layer", NOT_LINEAR)
def test_what_does_not_is_refused_with_the_reason(layer):
    layer, says = NOT_LINEAR[layer]
    training = layer.training
    assert re.search(says, why_not_linear(layer) or "")
    assert layer.training is training
    with pytest.raises(ValueError, match="target_modules: 'it' can't be adapted"):
        LoRA(r=1, target_modules=("it",)).attach(nn.ModuleDict({"it": layer}))


def test_the_proof_draws_no_number_of_anybody_else():
    layer, state = Renamed(4, 3), torch.get_rng_state()
    assert why_not_linear(layer) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dense_weight_is_out_by_in_and_a_view_where_the_layer_stores_it():
    for layer, (n_in, n_out), _ in LINEAR.values():
        if isinstance(layer, Foreign):
            with pytest.raises(
                ValueError, match="a Foreign has no dense weight: it is not a tensor called weight"
            ):
                dense_weight(layer)
            continue
        dense = dense_weight(layer)
        assert dense.shape == (n_out, n_in)
        if isinstance(layer, nn.Linear) and type(layer) is nn.Linear and "weight" in layer._parameters:
            assert dense.data_ptr() == layer.weight.data_ptr()
    conv = Conv1D(3, 4)
    x = torch.randn(2, 4)
    torch.testing.assert_close(conv(x), x @ dense_weight(conv).T + conv.bias)
    quantised = Quantised(nn.Linear(4, 3))
    assert torch.equal(dense_weight(quantised), quantised.weight * quantised.scale)


def test_stored_as_is_its_own_inverse():
    for layer in (nn.Linear(4, 3), Conv1D(3, 4), nn.Embedding(4, 3)):
        assert transposed(layer) is (not isinstance(layer, nn.Linear))
        assert torch.equal(stored_as(layer, stored_as(layer, layer.weight)), layer.weight)


@pytest.mark.parametrize("make", [FalconLinear, Renamed], ids=["Falcon's", "in other words"])
def test_lora_on_a_proven_subclass_computes_merges_and_goes_again(make):
    model, x = nn.ModuleDict({"it": make(6, 5)}).eval(), torch.randn(3, 6)
    before = model["it"](x)
    moved(LoRA(r=2, lora_alpha=4, target_modules=("it",)).attach(model))
    layer = model["it"]
    expected = before + 2 * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected)
    assert isinstance(layer, make)
    merge(model)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(dense_weight(layer) @ x.T + layer.bias[:, None], expected.T)
    unmerge(model)
    detach(model)
    assert type(model["it"]) is make
    assert torch.equal(model["it"](x), before)


def test_a_changed_subclass_is_taken_for_what_its_own_class_computes():
    """Or a second adapter would find no place beside the first."""
    model = nn.ModuleDict({"it": FalconLinear(4, 3)})
    moved(Adapter(bottleneck=2, target_modules=("it",)).attach(model))
    assert why_not_linear(model["it"]) is None


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "vit"])
def test_all_linear_is_every_linear_layer_but_the_head_and_tables(kind):
    model = tiny_model(kind)
    found = all_linear(model, set())
    expected = {
        name
        for name, m in model.named_modules()
        if isinstance(m, (nn.Linear, Conv1D)) and m is not (model.get_output_embeddings())
    }
    assert set(found) == expected
    assert "lm_head" not in found
    one = next(iter(found))
    assert one not in all_linear(model, {found[one]})
