"""What `widgets.masks` shows, against counts of one's own; its controls; what it refuses."""

import numpy
import pytest
import torch
from torch import nn

from pefttutor import BitFit, Masking, PaFi, SparseFineTuning, widgets
from pefttutor.widgets import Explorer, Picture, style
from pefttutor.widgets.mask_figures import CELLS, shrunk
from pefttutor.widgets.mask_source import at_fraction, choices, kind_of, layer_of, overlap, share
from tests.tiny import llama


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Look at the artists only; turning them into PNG takes most of the time."""
    monkeypatch.setattr(style, "png", lambda figure: b"")


def drawn(p, seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(w.shape, generator=generator) < p for n, w in llama().named_parameters()}


def scores(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(w.shape, generator=generator) for n, w in llama().named_parameters()}


def heights(axes):
    return {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}


def test_the_overview_counts_by_block_and_kind_and_shows_overlaps():
    one, two = drawn(0.1, 1), drawn(0.3, 2)
    picture = widgets.masks.figure({"one": one, "two": two})
    assert isinstance(picture, Picture)
    by_layer, by_kind, matrix = picture.axes
    assert [t.get_text() for t in by_layer.get_xticklabels()] == ["–", "0", "1"]
    kinds = [t.get_text() for t in by_kind.get_xticklabels()]
    assert kinds == ["embedding", "attention", "bias", "feed-forward", "norm"]
    for name, masks in {"one": one, "two": two}.items():
        block = [m for n, m in masks.items() if ".layers.1." in n]
        expected = sum(int(m.sum()) for m in block) / sum(m.numel() for m in block)
        assert heights(by_layer)[name][2] == pytest.approx(100 * expected)
        bias = [m for n, m in masks.items() if n.endswith("bias")]
        expected = sum(int(m.sum()) for m in bias) / sum(m.numel() for m in bias)
        assert heights(by_kind)[name][kinds.index("bias")] == pytest.approx(100 * expected)
    shared = sum(int((one[n] & two[n]).sum()) for n in one) / sum(int(m.sum()) for m in one.values())
    grid = numpy.asarray(matrix.images[0].get_array())
    assert grid[0, 1] == grid[1, 0] == pytest.approx(shared)
    assert f"{shared:.0%} (one, two)" in picture.alt


def bars_and_biases(share):
    """A mask with `share` of each matrix and all of each bias: on a linear axis the matrices' bars would be flat."""
    generator = torch.Generator().manual_seed(0)
    return {
        n: torch.rand(w.shape, generator=generator) < (1 if n.endswith("bias") else share)
        for n, w in llama().named_parameters()
    }


@pytest.mark.parametrize("share", [0.03, 0.003])
@pytest.mark.parametrize("part", ["figure", "explorer"])
def test_numbers_of_a_logarithmic_axis_are_written_out(part, share):
    source = {"one": bars_and_biases(share), "two": drawn(0.3, 2)}
    picture = widgets.masks.figure(source) if part == "figure" else widgets.masks(source).figure
    axes = next(axes for axes in picture.axes if axes.get_title(loc="left") == "By kind of tensor")
    assert axes.get_yscale() == "log"
    picture.draw_without_rendering()
    low, high = axes.get_ylim()
    written = [t.get_text() for t in axes.get_yticklabels() if low <= t.get_position()[1] <= high]
    assert len(written) >= 3
    values = [float(text) for text in written]  # neither $10^{1}$ nor 1e-05
    assert values == pytest.approx([v for v in axes.get_yticks() if low <= v <= high])
    assert not any("e" in text for text in written)
    assert not any(t.get_text() for t in axes.get_yticklabels(minor=True))


def test_the_legend_lies_on_no_bar():
    source = {name: drawn(0.3, seed) for seed, name in enumerate(("one", "two", "three", "four"))}
    for picture in (widgets.masks.figure(source), widgets.masks(source).figure):
        picture.draw_without_rendering()
        (legend,) = picture.legends
        assert {t.get_text() for t in legend.get_texts()} <= set(source)
        box = legend.get_window_extent()
        assert not any(box.overlaps(axes.get_window_extent()) for axes in picture.axes)
        assert not any(axes.get_legend() for axes in picture.axes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
def test_a_mask_of_zeros_and_ones_is_a_mask_whatever_its_type(dtype):
    one = drawn(0.1, 1)
    written = {name: mask.to(dtype) for name, mask in one.items()}
    found = at_fraction(choices(written)["mask"], 0.005)
    assert all(torch.equal(found[name], mask) for name, mask in one.items())
    assert "fraction" not in widgets.masks(written).values
    assert widgets.masks.figure(written).alt == widgets.masks.figure(one).alt


def test_whole_numbers_that_are_scores_are_ranked():
    ranks = {"w": torch.arange(200).view(10, 20)}
    found = at_fraction(choices(ranks)["mask"], 0.05)["w"]
    assert torch.equal(found, ranks["w"] >= 190)


def test_what_a_method_learns_beside_a_weight_is_no_tensor_of_the_base():
    model = Masking(target_modules=("q_proj",), modules_to_save=("lm_head",)).attach(llama())
    assert set(choices(model)["mask"]) == {name for name, _ in llama().named_parameters()}


@pytest.mark.parametrize("method", [BitFit(), PaFi(fraction=0.05)])
def test_an_adapted_model_shows_what_trains(method):
    model = method.attach(llama())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in llama().parameters())
    assert f"{trained / total:.2%}" in widgets.masks.figure(model).alt
    explorer = widgets.masks(model)
    assert list(explorer.controls) == ["method", "compare_with", "tensor"]  # a mask has no fraction to choose


def test_a_mask_of_ones_own_can_be_attached_and_shown():
    mine = drawn(0.1, 3)
    model = SparseFineTuning().attach(llama(), mine)
    again = choices(model)["mask"]
    assert all(torch.equal(again[name], mask) for name, mask in mine.items())


def test_moving_the_controls_changes_method_tensor_and_fraction():
    explorer = widgets.masks({"scores": scores(), "mine": drawn(0.2, 1)})
    assert isinstance(explorer, Explorer)
    assert explorer.values["compare_with"] == "mine"
    name = "model.layers.1.mlp.up_proj.weight"
    explorer.controls["tensor"].value = name
    explorer.controls["fraction"].value = 0.3
    assert explorer.error is None
    assert name in explorer.caption
    chosen = at_fraction(scores(), 0.3)
    shown = numpy.asarray(explorer.figure.axes[0].images[0].get_array())
    numpy.testing.assert_array_equal(shown, chosen[name].float().numpy())
    assert "scores chooses 30.00% of all entries" in explorer.caption
    explorer.controls["method"].value = "mine"
    assert "mine chooses 2" in explorer.caption
    explorer.set(tensor="model.norm.weight", fraction=0.001, method="scores")
    assert explorer.figure.axes[0].images[0].get_array().shape == (1, 16)
    assert "chance would share 20%" in explorer.caption


def test_a_large_matrix_is_shown_as_shares_of_blocks():
    mask = torch.zeros(2 * CELLS, 3 * CELLS, dtype=torch.bool)
    mask[:2, :3] = True
    small = shrunk(mask)
    assert small.shape == (CELLS, CELLS)
    assert small[0, 0] == 1
    assert small.sum() == 1


def test_overlap_and_share_are_what_they_say():
    a = {"x": torch.tensor([True, True, False, False]), "y": torch.tensor([True])}
    b = {"x": torch.tensor([True, False, False, False]), "y": torch.tensor([False])}
    assert overlap(a, b) == 1
    assert overlap(a, {"x": ~a["x"], "y": ~a["y"]}) == 0
    assert share(a, {"x": "g", "y": "h"}) == {"g": 0.5, "h": 1.0}
    assert layer_of(["m.layers.0.q.weight", "m.layers.1.q.weight", "m.e"]) == {
        "m.layers.0.q.weight": "0", "m.layers.1.q.weight": "1", "m.e": "–"}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("h.0.attn.c_attn.weight", (4, 12), "attention"),
        ("h.0.mlp.c_fc.weight", (4, 16), "feed-forward"),
        ("encoder.layer.0.attention.output.dense.weight", (4, 4), "attention"),
        ("encoder.layer.0.intermediate.dense.weight", (16, 4), "feed-forward"),
        ("encoder.layer.0.output.LayerNorm.weight", (4,), "norm"),
        ("wte.weight", (9, 4), "embedding"),
        ("score.weight", (3, 4), "other"),
    ],
)
def test_kinds_go_by_the_usual_names(name, shape, kind):
    assert kind_of(name, torch.zeros(shape)) == kind


@pytest.mark.parametrize(
    ("source", "settings", "says"),
    [
        ([1], {}, "expected a model, masks or scores"),
        ({}, {}, "expected a model"),
        ({"a": {"x": torch.ones(2)}, "b": {"x": torch.ones(3)}}, {}, "a and b have no tensor"),
        ({"a": {"x": torch.tensor([float("nan")])}}, {}, "a: the scores of x hold NaN"),
        ({"x": torch.ones(2)}, {"fractions": (0,)}, "fraction is 0"),
        ({"x": torch.ones(2)}, {"tensor": "y"}, "there is no tensor 'y'"),
    ],
)
def test_what_cannot_be_shown_is_refused(source, settings, says):
    with pytest.raises(ValueError, match=says):
        widgets.masks(source, **settings)
    if "fractions" in settings:
        with pytest.raises(ValueError, match=says):
            widgets.masks.figure(source, fraction=0)


def test_a_module_without_blocks_works():
    explorer = widgets.masks({"x.weight": torch.rand(3, 4), "b": torch.rand(2)})
    assert "x.weight" in explorer.caption
    assert isinstance(widgets.masks.figure(nn.Linear(2, 2)), Picture)
