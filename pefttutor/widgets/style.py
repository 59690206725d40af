"""One look for every figure of the kit: Okabe-Ito colours on white paper, readable in a dark theme too."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy
from cycler import cycler
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

# Okabe & Ito (2008): told apart with every common form of colour blindness.
OKABE_ITO = {
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "green": "#009E73",
    "orange": "#E69F00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "black": "#000000",
    "yellow": "#F0E442",
}
GREY = "#8C8C8C"  # for what is there to compare with, not to look at

SEQUENTIAL = LinearSegmentedColormap.from_list(
    "paper-blue", ["#FFFFFF", "#9CCDEB", OKABE_ITO["blue"], "#00344F"]
)
DIVERGING = LinearSegmentedColormap.from_list(
    "blue-paper-vermillion", ["#00344F", OKABE_ITO["blue"], "#FFFFFF", OKABE_ITO["vermillion"], "#612B00"]
)

_PAPER = {
    "figure.dpi": 100,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.prop_cycle": cycler(color=list(OKABE_ITO.values())),
    "image.interpolation": "nearest",
    "legend.frameon": False,
}


@contextlib.contextmanager
def paper() -> Iterator[None]:
    """Draw with the kit's look, whatever style the notebook has set; the notebook's own comes back afterwards.

    >>> with paper(): matplotlib.rcParams["axes.titlelocation"]
    'left'
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_PAPER)
        yield


class Picture(Figure):
    """A matplotlib figure that carries its alt text and shows itself, without pyplot.

    A notebook stores it as PNG at twice the screen's resolution and a fixed sentence, so that it is sharp, and the
    same text every time. Create it, and draw into it, inside `with paper():`.

    >>> with paper(): picture = Picture(6, 3, alt="an empty picture")
    >>> picture.alt, width_px(picture), height_px(picture)
    ('an empty picture', 600, 300)
    """

    def __init__(self, width_in: float, height_in: float, *, alt: str, layout: Any = "constrained") -> None:
        super().__init__(figsize=(width_in, height_in), layout=layout, facecolor="white")
        FigureCanvasAgg(self)
        self.alt = alt

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        return picture_bundle(self, png(self), text=self.alt, alt=self.alt)


def png(figure: Figure, *, scale: float = 2) -> bytes:
    """The figure as PNG bytes with `scale` image pixels for a pixel on the screen.

    >>> png(Picture(1, 1, alt="an empty picture"))[1:4]
    b'PNG'

    Cost: it is drawn once, where `savefig` draws twice; it has 256 colours, which makes notebooks a third of the size.
    """
    dpi, canvas = figure.dpi, figure.canvas
    try:
        figure.dpi = scale * dpi
        agg = FigureCanvasAgg(figure)
        with paper():
            agg.draw()
        image = Image.fromarray(numpy.asarray(agg.buffer_rgba())).convert("RGB")
    finally:
        figure.dpi = dpi
        figure.set_canvas(canvas)
    buffer = io.BytesIO()
    image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(buffer, "png")
    return buffer.getvalue()


def width_px(figure: Figure) -> int:
    """How many pixels of the screen a figure is wide.

    >>> width_px(Picture(6, 3, alt="an empty picture"))
    600
    """
    return round(figure.get_figwidth() * figure.dpi)


def height_px(figure: Figure) -> int:
    """How many pixels of the screen a figure is high.

    >>> height_px(Picture(6, 3, alt="an empty picture"))
    300
    """
    return round(figure.get_figheight() * figure.dpi)


def picture_bundle(figure: Figure, image: bytes, *, text: str, alt: str) -> tuple[dict, dict]:
    """What Jupyter stores for a picture: a text, the PNG, and how wide it is shown with which alt text.

    >>> picture = Picture(1, 1, alt="an empty picture")
    >>> picture_bundle(picture, png(picture), text="a picture", alt=picture.alt)[1]
    {'image/png': {'width': 100, 'alt': 'an empty picture'}}
    """
    data = {"text/plain": text, "image/png": base64.b64encode(image).decode("ascii")}
    return data, {"image/png": {"width": width_px(figure), "alt": alt}}
