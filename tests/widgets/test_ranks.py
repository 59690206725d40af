"""What `widgets.ranks` draws, against numpy; the score by rank."""

import matplotlib.colors
import numpy
import pytest
import torch
from torch import nn

from pefttutor import LoRA, widgets
from pefttutor.widgets import Explorer, Picture, style


def adapted_by(layer):
    """The one change that a method has made of this layer."""
    (change,) = vars(layer)["_changes"].values()
    return change


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(12, 12), nn.Linear(12, 20)


@pytest.fixture
def fast(monkeypatch):
    """Look at the artists only; turning them into PNG takes most of the time."""
    monkeypatch.setattr(style, "png", lambda figure: b"")


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Module()
    net.layers = nn.ModuleList([Block() for _ in range(3)])
    LoRA(r=4, lora_alpha=8).attach(net)
    for layer in (part for block in net.layers for part in (block.q_proj, block.v_proj)):
        layer.lora_B.data = torch.randn(
            layer.lora_B.shape, generator=torch.Generator().manual_seed(layer.out_features)
        )
    net.layers[0].q_proj.lora_B.data[:, 1:] = 0  # one direction only
    net.layers[2].v_proj.lora_B.data[:] = 0  # nothing learnt
    return net


NAMES = [f"layers.{i}.{name}" for i in range(3) for name in ("q_proj", "v_proj")]


def sigma(model, name):
    layer = model.get_submodule(name)
    product = adapted_by(layer).scaling * (layer.lora_B @ layer.lora_A).detach().double().numpy()
    return numpy.linalg.svd(product, compute_uv=False)[:4]


def entropy_rank(values):
    p = values[values > 1e-9] / values.sum()
    return numpy.exp(-(p * numpy.log(p)).sum())


def test_the_overview_shows_effective_rank_by_layer_and_module(model):
    picture = widgets.ranks.figure(model)
    assert isinstance(picture, Picture)
    grid, spectra = picture.axes
    assert [t.get_text() for t in grid.get_xticklabels()] == ["q_proj", "v_proj"]
    assert [t.get_text() for t in grid.get_yticklabels()] == ["0", "1", "2"]
    wanted = [[entropy_rank(sigma(model, f"layers.{i}.{n}")) for n in ("q_proj", "v_proj")] for i in range(2)]
    drawn = grid.images[0].get_array()
    numpy.testing.assert_allclose(drawn[:2], wanted, atol=1e-5)
    assert drawn[0, 0] == pytest.approx(1, abs=1e-5)
    assert drawn[2, 1] == 0
    assert [text.get_text() for text in grid.texts] == [f"{value:.1f}" for value in drawn.flatten()]
    assert "from 0.0 to" in picture.alt
    assert "6 layers" in picture.alt
    assert {line.get_color() for line in spectra.lines} == {"#0072B2", "#D55E00"}
    numpy.testing.assert_allclose(spectra.lines[3].get_ydata(), sigma(model, NAMES[3]), rtol=1e-5)
    assert len(spectra.lines) == 6


def test_a_model_that_has_learnt_nothing_says_so(model, fast):
    for block in model.layers:
        block.q_proj.lora_B.data.zero_()
        block.v_proj.lora_B.data.zero_()
    assert "nothing learnt yet" in widgets.ranks.figure(model).axes[1].texts[0].get_text()
    explorer = widgets.ranks(model)
    explorer.set(rank=3)
    assert explorer.error is None


def test_the_slider_truncates_the_matrix(model, fast):
    explorer = widgets.ranks(model)
    assert isinstance(explorer, Explorer)
    assert explorer.values == {"rank": 1, "layer": NAMES[0]}
    layer = model.layers[1].v_proj
    dense = adapted_by(layer).scaling * (layer.lora_B @ layer.lora_A).detach().double().numpy()
    U, values, Vh = numpy.linalg.svd(dense)
    explorer.set(layer="layers.1.v_proj")
    for k in (0, 2, 4):
        explorer.controls["rank"].value = k
        whole, part, _, bars, curve = explorer.figure.axes
        numpy.testing.assert_allclose(whole.images[0].get_array(), dense, atol=1e-6)
        numpy.testing.assert_allclose(part.images[0].get_array(), (U[:, :k] * values[:k]) @ Vh[:k], atol=1e-6)
        assert whole.images[0].get_clim() == part.images[0].get_clim()
        numpy.testing.assert_allclose([bar.get_height() for bar in bars.patches], values[:4], atol=1e-6)
        blue = [matplotlib.colors.to_hex(bar.get_facecolor()).upper() == "#0072B2" for bar in bars.patches]
        assert blue == [i < k for i in range(4)]
        share = 100 * numpy.cumsum([0, *values[:4] ** 2]) / (values**2).sum()
        numpy.testing.assert_allclose(curve.lines[0].get_ydata(), share, atol=1e-5)
        assert curve.lines[0].get_linestyle() == "-"  # every rank is there
        assert curve.lines[1].get_xdata()[0] == k
        assert f"rank {k} of 4 keeps {share[k]:.0f} %" in explorer.figure.alt


def test_a_large_matrix_is_shown_in_part_without_being_formed():
    B, A = torch.randn(700, 2), torch.randn(2, 300)
    explorer = widgets.ranks({"layers.0.up": (B, A, 1.0)}, rank=2)
    whole = explorer.figure.axes[0]
    numpy.testing.assert_allclose(whole.images[0].get_array(), (B[::3] @ A[:, ::2]).numpy(), atol=1e-4)
    assert whole.get_ylabel() == "output (one in 3)"
    assert whole.get_ylim() == (700, 0)


def energy(model):
    """A score that knows whether ΔW was cut: Σ ‖ΔW‖² over the layers."""
    layers = [part for block in model.layers for part in (block.q_proj, block.v_proj)]
    changes = [
        (adapted_by(layer).scaling * layer.lora_B @ layer.lora_A).detach().double() for layer in layers
    ]
    return float(sum(change.square().sum() for change in changes))


def test_the_score_is_of_the_truncated_model_measured_once_a_rank(model, fast):
    calls = []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def score(given):
        assert given is model
        calls.append(energy(given))
        return calls[-1]

    explorer = widgets.ranks(model, score=score, score_name="energy", rank=2)
    for rank in (3, 2, 0, 4, 3):
        explorer.controls["rank"].value = rank
    wanted = {k: sum((sigma(model, name)[:k] ** 2).sum() for name in NAMES) for k in (0, 2, 3, 4)}
    assert calls == pytest.approx([wanted[k] for k in (0, 4, 2, 3)], rel=1e-5)
    curve = explorer.figure.axes[4]
    assert curve.lines[0].get_linestyle() == "None"  # a line from 0 to 2 would say what rank 1 does
    assert list(curve.lines[0].get_xdata()) == [0, 2, 3, 4]
    assert list(curve.lines[0].get_ydata()) == pytest.approx(list(wanted.values()), rel=1e-5)
    assert f"energy {wanted[3]:.3f}"[:9] in explorer.figure.alt
    assert curve.get_ylabel() == "energy"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_score_that_fails_leaves_the_model_as_it_was_and_says_so(model, fast):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def score(given):
        if torch.linalg.matrix_rank(given.layers[1].q_proj.lora_A) == 3:
            raise KeyError("no test data")
        return 0.5

    explorer = widgets.ranks(model, score=score)
    explorer.controls["rank"].value = 3
    assert "KeyError: &#x27;no test data&#x27;" in explorer._message.value
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    explorer.controls["rank"].value = 2
    assert explorer.error is None


def test_bad_input(model, fast):
    with pytest.raises(ValueError, match="rank=5: expected a rank from 0 to 4"):
        widgets.ranks(model, rank=5)
    with pytest.raises(ValueError, match="score= needs the model"):
        widgets.ranks({"q": torch.eye(3)}, score=energy)
    with pytest.raises(ValueError, match="gave nan at rank 0"):
        widgets.ranks(model, score=lambda given: float("nan"))
    with pytest.raises(ValueError, match="no adapted layer is called 'k_proj'"):
        widgets.ranks.figure(model, modules=["k_proj"])
    assert list(widgets.ranks(model, modules=["q_proj"]).controls["layer"].options) == NAMES[::2]


def test_full_fine_tuning_has_as_many_directions_as_the_matrix(fast):
    torch.manual_seed(0)
    before, after = nn.Sequential(nn.Linear(6, 9)), nn.Sequential(nn.Linear(6, 9))
    explorer = widgets.ranks(after, base=before, score=lambda given: float(given[0].weight.sum()))
    assert explorer.controls["rank"].max == 6
    scores = explorer.figure.axes[4].lines[0]
    assert list(scores.get_ydata()[[0, -1]]) == pytest.approx(
        [before[0].weight.sum().item(), after[0].weight.sum().item()], abs=1e-5
    )
