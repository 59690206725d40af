"""What `widgets.moving_ranks` draws of a training; the hook that notes it."""

import ipywidgets
import numpy
import pytest
import torch
from torch import nn

from pefttutor import AdaLoRA, fit, widgets
from pefttutor.widgets import Explorer, Picture, RankRecord, style

NAMES = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
STEPS = [
    dict(zip(NAMES, ranks, strict=True)) for ranks in ([4, 4, 4, 4], [3, 4, 2, 4], [1, 4, 3, 3], [1, 4, 3, 0])
]


@pytest.fixture
def fast(monkeypatch):
    """Look at the artists only; turning them into PNG takes most of the time."""
    monkeypatch.setattr(style, "png", lambda figure: b"")


def layer_lines(axes):
    return axes.lines[: len(NAMES)]


def test_the_figure_shows_the_end_and_the_way_of_every_layer():
    picture = widgets.moving_ranks.figure(STEPS)
    assert isinstance(picture, Picture)
    grid, ways = picture.axes
    assert [t.get_text() for t in grid.get_xticklabels()] == ["q_proj", "v_proj"]
    assert [t.get_text() for t in grid.get_yticklabels()] == ["0", "1"]
    numpy.testing.assert_array_equal(grid.images[0].get_array(), [[1, 4], [3, 0]])
    assert [text.get_text() for text in grid.texts] == ["1", "4", "3", "0"]
    assert grid.get_title(loc="left") == "Ranks after step 3: 8 in all"
    drawn = [list(line.get_ydata()) for line in layer_lines(ways)]
    assert drawn == [[ranks[name] for ranks in STEPS] for name in NAMES]
    assert len({line.get_color() for line in ways.lines}) == 2
    assert picture.alt == (
        "Ranks of 4 layers over 4 steps: together from 16 to 8, in the end from 0 to 4. 1 time a layer got rank."
    )


def test_the_slider_goes_through_the_training(fast):
    explorer = widgets.moving_ranks(STEPS)
    assert isinstance(explorer, Explorer)
    assert isinstance(explorer.controls["step"], ipywidgets.IntSlider)
    assert (explorer.controls["step"].min, explorer.controls["step"].max) == (0, 3)
    assert list(explorer.controls["layer"].options) == NAMES
    explorer.set(step=2, layer=NAMES[2])
    grid, ways = explorer.figure.axes
    numpy.testing.assert_array_equal(grid.images[0].get_array(), [[1, 4], [3, 3]])
    assert explorer.caption == (
        f"After step 2 all layers have 11 ranks together, {NAMES[2]} has 3. "
        "In this step 2 layers lost rank and 1 got some."
    )
    back, here = ways.lines[-3:-1]
    assert (list(back.get_xdata()), list(back.get_ydata())) == ([2], [3])
    assert (list(here.get_xdata()), list(here.get_ydata())) == ([2], [3])
    assert [t.get_text() for t in ways.get_legend().get_texts()] == ["got rank"]
    explorer.set(layer=NAMES[0])
    assert explorer.figure.axes[1].get_legend() is None
    assert not len(explorer.figure.axes[1].lines[-3].get_xdata())
    assert widgets.moving_ranks(STEPS, step=3).values["step"] == 3
    assert "In this step 0 layers lost rank and 0 got some." in explorer.set(step=0).caption


def test_a_notebook_keeps_a_fixed_sentence_and_a_picture():
    data, _ = widgets.moving_ranks(STEPS)._repr_mimebundle_()
    assert data["text/plain"].startswith("Ranks while a method trains")
    assert data["image/png"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.v_proj(self.q_proj(x))


def trained(recorded):
    torch.manual_seed(0)
    method, model = AdaLoRA(init_r=4, target_r=2, total_step=9, tinit=1, tfinal=2), nn.Sequential(Block())
    method.attach(model)
    record = RankRecord(method)
    data = [{"x": torch.randn(6, generator=torch.Generator().manual_seed(i))} for i in range(8)]
    fit(
        model, data, method=record if recorded else None, steps=9, batch_size=4, lr=0.05, progress=False,
        loss=lambda model, batch: model(batch["x"]).square().mean(),
    )  # fmt: skip
    return model, method, record


def test_the_record_lets_the_method_work_and_notes_every_step():
    model, method, record = trained(recorded=True)
    assert len(record.steps) == 9
    assert [sum(ranks.values()) for ranks in record.steps] == [method.budget(step, 2) for step in range(9)]
    assert record.steps[-1] == method.ranks(model)
    alone, _, _ = trained(recorded=False)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert "together from 8 to 4" in widgets.moving_ranks.figure(record.steps).alt


def test_a_method_without_hooks_of_its_own_is_recorded_too():
    class Still:
        def ranks(self, model):
            return {"0": 3}

    record = RankRecord(Still())
    record.after_step(None, 0)
    assert record.steps == [{"0": 3}]
    assert not hasattr(record, "penalty")


def test_bad_input(fast):
    for steps in ([], [{}]):
        with pytest.raises(ValueError, match="there are no ranks to show"):
            widgets.moving_ranks(steps)
    with pytest.raises(ValueError, match=r"step 1 has ranks of \['v'\]; expected those of step 0: \['q'\]"):
        widgets.moving_ranks.figure([{"q": 1}, {"v": 1}])
    for rank in (-1, 1.5, True):
        with pytest.raises(
            ValueError, match=r"step 0: the rank of q is .*expected a whole number, 0 or more"
        ):
            widgets.moving_ranks.figure([{"q": rank}])
    with pytest.raises(ValueError, match="step=4: expected a step from 0 to 3"):
        widgets.moving_ranks(STEPS, step=4)
    with pytest.raises(TypeError, match="Linear has no ranks"):
        RankRecord(nn.Linear(2, 2))
