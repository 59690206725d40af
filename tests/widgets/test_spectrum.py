"""Singular values of ΔW against numpy's of the dense matrix, and the truncated model, put back bit by bit."""

import copy
import math

import numpy
import pytest
import torch
from torch import nn

import pefttutor
from pefttutor import LoRA
from pefttutor.widgets.names import place
from pefttutor.widgets.spectrum import decompose, effective_rank, stable_rank, truncated, updates


def adapted_by(layer):
    """The one change that a method has made of this layer."""
    (change,) = vars(layer)["_changes"].values()
    return change


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(12, 10), nn.Linear(10, 7)

    def forward(self, x):
        return self.v_proj(self.q_proj(x).tanh())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, ids):
        return self.layers[0](self.embed(ids))


@pytest.fixture
def model():
    """Adapted by the real LoRA, with factors that are not zero."""
    torch.manual_seed(0)
    net = LoRA(r=4, lora_alpha=6, target_modules=("embed", "q_proj", "v_proj")).attach(Net())
    for seed, parameter in enumerate(p for p in net.parameters() if p.requires_grad):
        parameter.data = random(*parameter.shape, seed=seed)
    return net


def dense(layer):
    return (adapted_by(layer).scaling * (layer.lora_B.double() @ layer.lora_A.double())).detach().numpy()


@pytest.mark.parametrize(
    "shapes", [((30, 4), (4, 50)), ((50, 4), (4, 30)), ((3, 8), (8, 40)), ((40, 8), (8, 3)), ((5, 5), (5, 5))]
)
@pytest.mark.parametrize("scaling", [2.0, -0.5])
def test_factors_give_the_svd_of_their_product(shapes, scaling):
    B, A = random(*shapes[0]), random(*shapes[1], seed=1)
    product = scaling * B.double().numpy() @ A.double().numpy()
    update = decompose((B, A, scaling))
    n = min(shapes[0] + shapes[1])
    numpy.testing.assert_allclose(update.sigma, numpy.linalg.svd(product, compute_uv=False)[:n], atol=1e-12)
    numpy.testing.assert_allclose(update.matrix(), product, atol=1e-12)
    numpy.testing.assert_allclose(update.U.T @ update.U, numpy.eye(n), atol=1e-12)
    numpy.testing.assert_allclose(update.Vh @ update.Vh.T, numpy.eye(n), atol=1e-12)


def test_fewer_directions_are_the_best_approximation_and_what_they_keep_is_measured():
    matrix = random(9, 6)
    update = decompose(matrix)
    U, sigma, Vh = numpy.linalg.svd(matrix.double().numpy(), full_matrices=False)
    for k in range(7):
        best = (U[:, :k] * sigma[:k]) @ Vh[:k]
        numpy.testing.assert_allclose(update.matrix(k), best, atol=1e-12)
        lost = (
            numpy.linalg.norm(matrix.double().numpy() - best) ** 2 / numpy.linalg.norm(matrix.double()) ** 2
        )
        assert update.kept(k) == pytest.approx(1 - lost, abs=1e-12)
    numpy.testing.assert_allclose(
        update.matrix(2, rows=slice(None, None, 4), columns=slice(None, None, 3)), update.matrix(2)[::4, ::3]
    )


@pytest.mark.parametrize(
    ("sigma", "effective", "stable"),
    [
        ([3.0, 3.0, 3.0, 0.0], 3.0, 3.0),
        ([5.0], 1.0, 1.0),
        ([0.0, 0.0], 0.0, 0.0),
        ([2.0, 1.0, 1.0], 2 * math.sqrt(2), 1.5),  # entropy of (½, ¼, ¼) is 1.5 bits
    ],
)
def test_effective_and_stable_rank_by_hand(sigma, effective, stable):
    assert effective_rank(torch.tensor(sigma).double()) == pytest.approx(effective)
    assert stable_rank(torch.tensor(sigma).double()) == pytest.approx(stable)


def test_every_adapted_layer_of_a_lora_model_is_found(model):
    found = updates(model)
    blocks = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
    assert list(found) == ["embed", *blocks]
    for name, update in found.items():
        numpy.testing.assert_allclose(update.matrix(), dense(model.get_submodule(name)), atol=1e-12)
    assert list(updates(model, modules=["v_proj", "layers.0.q_proj"])) == [blocks[0], blocks[1], blocks[3]]


def test_half_precision_factors_are_taken_exactly():
    B, A = random(6, 2).bfloat16(), random(2, 8, seed=1).bfloat16()
    numpy.testing.assert_allclose(decompose((B, A, 1)).matrix(), B.double() @ A.double(), atol=1e-12)


def test_before_and_after_full_fine_tuning():
    torch.manual_seed(0)
    before = Net()
    after = copy.deepcopy(before)
    after.layers[1].q_proj.weight.data += random(10, 2) @ random(2, 12, seed=1)
    for pair in ((after, before), (after.state_dict(), before.state_dict())):
        found = updates(pair[0], base=pair[1])
        assert list(found) == ["layers.1.q_proj"]
        change = after.layers[1].q_proj.weight - before.layers[1].q_proj.weight
        numpy.testing.assert_allclose(found["layers.1.q_proj"].matrix(), change.detach(), atol=1e-6)
    with truncated(after, found, 1), torch.no_grad():
        cut = decompose(after.layers[1].q_proj.weight - before.layers[1].q_proj.weight)
        assert effective_rank(cut.sigma) == pytest.approx(1, abs=1e-3)


def state(model):
    return {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}


def assert_same(model, before):
    for name, tensor in model.state_dict().items():
        pointer, value = before[name]
        assert tensor.data_ptr() == pointer, name
        assert torch.equal(tensor, value), name


@pytest.mark.parametrize("k", [0, 1, 3])
def test_the_truncated_model_computes_with_the_truncated_change(model, k):
    found, before, ids = updates(model), state(model), torch.arange(20).reshape(4, 5)
    wanted = copy.deepcopy(model)
    for name, update in found.items():
        layer = wanted.get_submodule(name)
        change = update.matrix(k).float()
        layer.weight.data += change.T if name == "embed" else change
        layer.lora_B.data.zero_()
    parameters = dict(model.named_parameters())
    with truncated(model, found, k), torch.no_grad():
        torch.testing.assert_close(model(ids), wanted(ids))
        assert dict(model.named_parameters()).keys() == parameters.keys()
        assert all(p is parameters[name] for name, p in model.named_parameters())
    assert_same(model, before)


def test_at_full_rank_the_model_is_left_alone(model):
    found, before = updates(model), state(model)
    with truncated(model, found, 4):
        assert_same(model, before)


def test_the_model_is_put_back_also_after_an_exception(model):
    found, before = updates(model), state(model)

    def fail():
        with truncated(model, found, 1):
            assert not torch.equal(model.layers[0].q_proj.lora_A, before["layers.0.q_proj.lora_A"][1])
            raise RuntimeError("the score failed")

    with pytest.raises(RuntimeError, match="the score failed"):
        fail()
    assert_same(model, before)
    del model.layers[1].v_proj.lora_A  # the last layer fails, the others were already exchanged
    model.layers[1].v_proj.lora_A = nn.Parameter(torch.zeros(1, 1))
    before = state(model)
    block = truncated(model, found, 3)
    with pytest.raises(RuntimeError):
        block.__enter__()
    assert_same(model, before)


def test_a_merged_model_is_refused_with_the_way_out(model):
    found = updates(model)
    pefttutor.merge(model)
    before = state(model)
    with pytest.raises(ValueError, match=r"embed is merged.*unmerge"), truncated(model, found, 1):
        pass
    assert_same(model, before)


B, A = torch.ones(4, 2), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("source", "options", "error", "says"),
    [
        (Net(), {}, ValueError, "no adapted layer in Net: attach a method first.*base="),
        (Net(), {"base": Net().layers[0]}, ValueError, "don't have the same matrices"),
        (nn.Linear(3, 3), {"base": nn.Linear(3, 4)}, ValueError, r"\(4, 3\) before and \(3, 3\) after"),
        ([B], {}, TypeError, "got list"),
        ({}, {}, ValueError, "mapping is empty"),
        (
            {"q": (B, A, 1.0)},
            {"modules": ["k"]},
            ValueError,
            r"no adapted layer is called 'k'; there are \['q'\]",
        ),
        ({"q": (A, B, 1.0)}, {}, ValueError, r"q: expected .* got \(2, 3\) and \(4, 2\)"),
        ({"q": torch.ones(3)}, {}, ValueError, r"q: expected .* got \(3,\)"),
        ({"q": (B * math.nan, A, 1.0)}, {}, ValueError, "q: ΔW holds NaN or infinity.*diverged"),
        ({"q": A * math.inf}, {}, ValueError, "q: ΔW holds NaN or infinity"),
        ({"q": (B, A, math.nan)}, {}, ValueError, "q: ΔW holds NaN or infinity"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(source, options, error, says):
    with pytest.raises(error, match=says):
        updates(source, **options)


def test_equal_models_are_refused():
    net = Net()
    with pytest.raises(ValueError, match=r"equal; base= wants a copy\.deepcopy"):
        updates(net, base=net)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (
            ["model.layers.3.self_attn.q_proj", "model.layers.10.mlp.up_proj"],
            [("3", "q_proj"), ("10", "up_proj")],
        ),
        (
            [
                "bert.encoder.layer.0.attention.output.dense",
                "bert.encoder.layer.0.output.dense",
                "pooler.dense",
            ],
            [("0", "attention.output.dense"), ("0", "output.dense"), ("–", "pooler.dense")],
        ),
        (["encoder.block.0.q", "decoder.block.0.q"], [("encoder.block 0", "q"), ("decoder.block 0", "q")]),
        (["0", "2"], [("–", "0"), ("–", "2")]),
        (["0.q", "1.q"], [("0", "q"), ("1", "q")]),
    ],
)
def test_names_become_rows_and_columns(names, wanted):
    assert list(place(names).values()) == wanted
