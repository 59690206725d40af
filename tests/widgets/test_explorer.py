"""The Explorer, driven through its controls as a reader's hand does."""

import base64
import io

import ipywidgets
import matplotlib
import numpy
import pytest
from matplotlib.figure import Figure

from pefttutor.widgets import Explorer, Picture
from pefttutor.widgets.style import OKABE_ITO, png


def bars(rank, layer="q"):
    """As many bars as the rank says."""
    if rank == 4:
        raise ZeroDivisionError("no <rank> 4")
    picture = Picture(4, 2, alt=f"{rank} bars & {layer}")
    picture.subplots().bar(range(rank), [1] * rank)
    return picture


def make(**controls):
    return Explorer(bars, "Bars by rank.", **(controls or {"rank": range(1, 9), "layer": ["q", "v"]}))


def pixels(data):
    return matplotlib.image.imread(io.BytesIO(data))


def test_a_moved_slider_draws_again():
    explorer = make()
    before = explorer.png
    assert len(explorer.figure.axes[0].patches) == 1
    explorer.controls["rank"].value = 5
    assert len(explorer.figure.axes[0].patches) == 5
    assert explorer.png != before
    assert "5 bars &amp; q" in explorer._picture.value
    explorer.controls["layer"].value = "v"
    assert explorer.values == {"rank": 5, "layer": "v"}
    assert "5 bars &amp; v" in explorer._picture.value


def test_set_draws_once_whatever_it_moves():
    calls = []
    explorer = Explorer(
        lambda **values: calls.append(values) or bars(**values), "Bars.", rank=range(1, 9), layer=["q", "v"]
    )
    assert explorer.set(rank=3, layer="v") is explorer
    assert calls == [{"rank": 1, "layer": "q"}, {"rank": 3, "layer": "v"}]
    explorer.controls["rank"].value = 2  # and it still listens
    assert calls[-1] == {"rank": 2, "layer": "v"}


def test_the_picture_is_white_sharp_and_as_wide_as_it_says():
    explorer = make()
    image = pixels(explorer.png)
    assert image.shape[:2] == (400, 800)  # 4 × 2 inches, 100 dpi, twice
    assert 'width="400" height="200"' in explorer._picture.value
    assert base64.b64encode(explorer.png).decode() in explorer._picture.value
    assert 'alt="Bars by rank."' in explorer._picture.value
    assert (image[[0, 0, -1, -1], [0, -1, 0, -1], :3] == 1).all()


def test_a_dark_style_of_the_notebook_does_not_reach_the_picture():
    plain = make().png
    with matplotlib.rc_context({"axes.facecolor": "black", "text.color": "white", "font.size": 20}):
        assert make().png == plain
        assert matplotlib.rcParams["font.size"] == 20


def test_an_error_when_a_slider_moves_is_written_in_the_widget():
    explorer = make()
    before = explorer.png
    explorer.controls["rank"].value = 4
    assert isinstance(explorer.error, ZeroDivisionError)
    assert "ZeroDivisionError: no &lt;rank&gt; 4" in explorer._message.value
    assert "in bars" in explorer._message.value
    assert "still shows rank = 1, layer = q" in explorer._message.value
    assert explorer.png == before
    explorer.controls["rank"].value = 5
    assert explorer.error is None
    assert explorer._message.value == ""


def test_an_error_in_a_cell_is_raised():
    with pytest.raises(ZeroDivisionError, match="rank"):
        make(rank=range(4, 9))
    explorer = make()
    with pytest.raises(ZeroDivisionError, match="rank"):
        explorer.set(rank=4)
    assert "ZeroDivisionError" in explorer._message.value


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"rang": 2}, r"no control named \['rang'\]; the controls are \['rank', 'layer'\]"),
        ({"layer": "v", "rank": 9}, "rank=9 is not on the slider from 1 to 8"),
        ({"rank": 2, "layer": "k"}, r"layer='k' is none of \['q', 'v'\]"),
        ({"rank": "two"}, "rank='two'"),
    ],
)
def test_set_refuses_what_the_controls_cannot_show_and_moves_nothing(values, says):
    explorer = make()
    before = explorer.png
    with pytest.raises(ValueError, match=says):
        explorer.set(**values)
    assert explorer.values == {"rank": 1, "layer": "q"}
    assert explorer.png == before
    explorer.controls["rank"].value = 2
    assert len(explorer.figure.axes[0].patches) == 2


def test_controls_from_plain_values():
    def draw(**values):
        return Picture(1, 1, alt=repr(values))

    float_slider = ipywidgets.FloatSlider(value=0.5, min=0, max=1)
    explorer = Explorer(
        draw, "All.", rank=range(8, 0, -2), kind=("a", "b"), log_scale=True, share=float_slider
    )
    assert explorer.values == {"rank": 8, "kind": "a", "log_scale": True, "share": 0.5}
    slider = explorer.controls["rank"]
    assert (slider.min, slider.max, slider.step) == (2, 8, 2)
    assert slider.continuous_update is False
    assert explorer.controls["log_scale"].description == "log scale"
    assert explorer.controls["share"] is float_slider
    assert float_slider.description == "share"


@pytest.mark.parametrize("given", [range(3, 3), [], "abc", 3, None])
def test_a_control_that_cannot_be_made_is_named(given):
    with pytest.raises(ValueError, match=r"control 'rank': got .*expected a non-empty range"):
        Explorer(bars, "Bars.", rank=given)


def test_draw_must_return_a_figure():
    with pytest.raises(TypeError, match="must return a matplotlib Figure, not int"):
        Explorer(lambda rank: rank, "Nothing.", rank=range(3))


def test_what_a_notebook_stores_is_a_fixed_sentence_and_the_picture():
    explorer = make()
    first, _ = explorer._repr_mimebundle_()
    explorer.set(rank=7)
    data, metadata = explorer._repr_mimebundle_()
    assert data["text/plain"] == first["text/plain"] == "Bars by rank."
    assert base64.b64decode(data["image/png"]) == explorer.png
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.widget.model_id
    assert set(data) == {"text/plain", "image/png", "application/vnd.jupyter.widget-view+json"}
    assert metadata == {"image/png": {"width": 400, "alt": "7 bars & q"}}


def test_a_picture_shows_itself_without_pyplot():
    picture = Picture(3, 1, alt="Nothing yet.")
    data, metadata = picture._repr_mimebundle_()
    assert data["text/plain"] == "Nothing yet."
    assert base64.b64decode(data["image/png"]) == png(picture)
    assert metadata["image/png"] == {"width": 300, "alt": "Nothing yet."}


def test_any_figure_will_do():
    explorer = Explorer(lambda rank: Figure(figsize=(2, rank)), "Sizes.", rank=range(1, 4))
    explorer.set(rank=2)
    assert pixels(explorer.png).shape[:2] == (400, 400)
    assert ">Sizes.<" in explorer._picture.value


def test_the_colours_are_the_ones_of_okabe_and_ito():
    assert OKABE_ITO["blue"] == "#0072B2"
    assert len(set(OKABE_ITO.values())) == 8
    grey = [
        numpy.dot(matplotlib.colors.to_rgb(c), [0.299, 0.587, 0.114]) for c in list(OKABE_ITO.values())[:2]
    ]
    assert abs(grey[0] - grey[1]) > 0.05  # the first two can be told apart in print
