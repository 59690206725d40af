"""A weight that is used without calling its layer: its squares are the reference's, not those of the calls alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pefttutor.kernels import fisher
from pefttutor.kernels.fisher import squared_gradients, squared_gradients_reference
from pefttutor.memory.allocator import transient_bytes

F64 = torch.float64


def assert_same(model, forward, samples):
    expected = squared_gradients_reference(model, forward)
    ours = squared_gradients(model, forward, samples=samples)
    for name, value in expected.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-9, atol=1e-18, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert any(value.any() for value in expected.values())
    assert all(p.requires_grad for p in model.parameters())
    own = {key for layer in model.modules() for key in vars(layer)}
    assert not own & {"weight", "bias"}  # nothing is left in the parameters' place


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.linear = nn.Embedding(11, 6), nn.Linear(6, 6)

    def forward(self, x):
        return (self.linear(self.emb(x)).tanh() @ self.emb.weight.T).log_softmax(-1)[:, :, 3].sum(1)


def slow_names(monkeypatch):
    """Records which parameters are left to the reference."""
    seen, slow = [], fisher._add_one_by_one
    monkeypatch.setattr(fisher, "_add_one_by_one", lambda f, p, t: (seen.extend(p), slow(f, p, t))[1])
    return seen


def test_a_head_that_uses_the_embeddings_weight(monkeypatch):
    torch.manual_seed(0)
    model, x = TiedHead().double(), torch.randint(0, 11, (4, 5))
    assert_same(model, lambda: model(x), 4)
    seen = slow_names(monkeypatch)
    squared_gradients(model, lambda: model(x), samples=4)
    assert seen == ["emb.weight"]  # the linear layer goes the fast way


def test_a_penalty_on_a_weight():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 5, 3, dtype=F64)
    assert_same(model, lambda: model(x).tanh().sum((1, 2)) - model.weight.square().sum(), 4)


def test_a_layer_whose_forward_is_called_past_its_hooks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    x = torch.randn(4, 5, 3, dtype=F64)
    assert_same(model, lambda: model[1].forward(model[0](x)).tanh().sum((1, 2)), 4)


def test_attention_of_torch_reads_the_weights_of_its_output_layer():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0).double().eval()
    x = torch.randn(4, 3, 8, dtype=F64)
    assert_same(model, lambda: model(x).pow(3).sum((1, 2)), 4)


def test_deberta_reads_its_relative_embeddings_directly():
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = hf.DebertaV2Config(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=40, relative_attention=True, pos_att_type=["p2c", "c2p"], num_labels=3,
        position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True,
    )  # fmt: skip
    model, ids = hf.DebertaV2ForSequenceClassification(config).double().eval(), torch.randint(3, 50, (3, 7))
    assert_same(model, lambda: model(input_ids=ids).logits.log_softmax(-1)[:, 1], 3)


def test_a_forward_that_fails_leaves_the_layers_as_they_were():
    model = TiedHead()
    with pytest.raises(RuntimeError):
        squared_gradients(model, lambda: model(torch.zeros(4, 5)), samples=4)  # ids must be integers
    assert not any("weight" in vars(layer) or layer._forward_hooks for layer in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_parameter_that_nothing_uses_costs_no_second_forward():
    model, calls = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), []
    x = torch.randn(4, 3)

    def forward():
        calls.append(1)
        return model[0](x).sum(1)

    assert not squared_gradients(model, forward, samples=4)["1.weight"].any()
    assert len(calls) == 1


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("threads", [1], indirect=True)  # the profiler sees no helper's memory
@pytest.mark.usefixtures("way")
def test_memory_beside_the_result_falls_with_max_bytes(tokens, threads):
    """256 × 2048 entries: the result is 2 MiB, and so is one sample's gradient unless it is made in parts."""
    model, x = nn.Linear(256, 2048), torch.randn(2, tokens, 256)
    weight = model.weight.numel() * 4

    def peak(max_bytes):
        return transient_bytes(
            lambda: squared_gradients(model, lambda: model(x).sum((1, 2)), samples=2, max_bytes=max_bytes)
        )

    assert peak(1 << 14) < 1.15 * weight
    if tokens > 1:
        assert peak(1 << 26) > 1.9 * weight


def test_an_output_that_is_changed_in_place():
    model, x = (
        nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True), nn.Linear(3, 1)).double(),
        torch.randn(3, 4, 2).double(),
    )
    assert_same(model, lambda: model(x).sum((1, 2)), 3)


@pytest.mark.usefixtures("way")
def test_a_call_without_tokens_and_one_without_gradients():
    layer, x = nn.Linear(3, 2).double(), torch.randn(3, 4, 3).double()

    def forward():
        with torch.no_grad():
            still = layer(x).sum()
        return (layer(x[:, :0]).sum((1, 2)) + layer(x).sin().sum((1, 2))) * (1 + still)

    assert_same(layer, forward, 3)
