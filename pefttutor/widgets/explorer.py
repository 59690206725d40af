"""Explorer: a function that draws a figure, with sliders for its arguments."""

from __future__ import annotations

import base64
import html
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ipywidgets
from matplotlib.figure import Figure

from pefttutor.widgets import style

# An error has its own background, so that it can be read in a dark and in a light theme.
_ERROR = (
    '<div role="alert" style="background:#FDECEA;color:#7A1712;padding:6px 10px;line-height:1.4">{}</div>'
)
# An HTML widget, because an image widget has no alt text. Decoded at once and of known size, it doesn't flicker.
_PICTURE = """<figure style="margin:0">
<img alt="{alt}" src="data:image/png;base64,{data}" width="{width}" height="{height}" decoding="sync"
 style="max-width:100%;height:auto;background:white;border:1px solid #BBBBBB">
<figcaption role="status" style="line-height:1.4">{caption}</figcaption></figure>"""


class Explorer:
    """Call `draw(**values)` whenever a control moves, and show the figure that it returns.

    >>> def draw(rank, layer):
    ...     return style.Picture(6, 3, alt=f"{layer} at rank {rank}")
    >>> explorer = Explorer(draw, "What each rank keeps", rank=range(1, 9), layer=["q_proj", "v_proj"])
    >>> explorer.set(rank=5).caption
    'q_proj at rank 5'

    draw:     returns a matplotlib figure (made without pyplot); its `alt`, if it has one, is written under it.
    alt:      one fixed sentence that says what the picture shows; a notebook stores it beside the PNG.
    controls: a `range` becomes a slider, a sequence of options a drop-down list, a bool a check box;
              any ipywidgets control is taken as it is. The keyword is its name and the argument of `draw`.

    The picture is made by matplotlib and sent as PNG: no script is fetched, nothing is captured from the cell, and
    what a notebook stores (a sentence and the PNG) is a figure wherever there is no kernel. Arrow keys move a slider.

    Raises: what `draw` raises, at the first drawing and in `set`. When a control moves, nobody would see an exception:
    it is then written in the widget, and kept in `.error`.
    """

    def __init__(self, draw: Callable[..., Figure], alt: str, **controls: Any) -> None:
        self.alt = alt
        self.error: Exception | None = None
        self.controls = {name: _control(name, values) for name, values in controls.items()}
        self._draw = draw
        self._message, self._picture = ipywidgets.HTML(), ipywidgets.HTML()
        row = ipywidgets.HBox(
            list(self.controls.values()), layout=ipywidgets.Layout(flex_flow="row wrap", align_items="center")
        )
        self.widget = ipywidgets.VBox([row, self._message, self._picture])
        self._redraw()
        for control in self.controls.values():
            control.observe(self._moved, names="value")

    @property
    def values(self) -> dict[str, Any]:
        """What the controls say now, as `draw` gets it."""
        return {name: control.value for name, control in self.controls.items()}

    def set(self, **values: Any) -> Explorer:
        """Move controls from a cell or a test: `explorer.set(rank=5)`. Draws once.

        Raises: ValueError for an unknown control or a value out of range (nothing is moved then); what `draw` raises.
        """
        unknown = sorted(set(values) - set(self.controls))
        if unknown:
            raise ValueError(f"set: no control named {unknown}; the controls are {list(self.controls)}")
        before = self.values
        with self._unobserved():
            try:
                for name, value in values.items():
                    self._put(name, value)
            except ValueError:
                for name, value in before.items():
                    self.controls[name].value = value
                raise
        try:
            self._redraw()
        except Exception as error:
            self._show_error(error)
            raise
        return self

    def _put(self, name: str, value: Any) -> None:
        control = self.controls[name]
        # A wrong type is refused; of a number too large a slider makes its end, without a word.
        with suppress(Exception):
            control.value = value
        if control.value != value:
            raise ValueError(_refusal(name, value, control))

    @contextmanager
    def _unobserved(self) -> Iterator[None]:
        for control in self.controls.values():
            control.unobserve(self._moved, names="value")
        try:
            yield
        finally:
            for control in self.controls.values():
                control.observe(self._moved, names="value")

    def _moved(self, _change: Any) -> None:
        try:
            self._redraw()
        except Exception as error:
            self._show_error(error)

    def _redraw(self) -> None:
        values = self.values
        with style.paper():
            figure = self._draw(**values)
        if not isinstance(figure, Figure):
            raise TypeError(f"draw must return a matplotlib Figure, not {type(figure).__name__}")
        png = style.png(figure)
        caption = getattr(figure, "alt", "") or self.alt
        self._picture.value = _PICTURE.format(
            alt=html.escape(self.alt),
            caption=html.escape(caption),
            data=base64.b64encode(png).decode("ascii"),
            width=style.width_px(figure),
            height=style.height_px(figure),
        )
        self.figure, self.png, self.caption, self._drawn = figure, png, caption, values
        self.error, self._message.value = None, ""

    def _show_error(self, error: Exception) -> None:
        self.error = error
        where = traceback.extract_tb(error.__traceback__)[-1]
        drawn = ", ".join(f"{name} = {value}" for name, value in self._drawn.items())
        text = html.escape(f"{type(error).__name__}: {error}  (line {where.lineno} in {where.name})")
        self._message.value = _ERROR.format(f"<b>{text}</b><br>The picture still shows {html.escape(drawn)}.")

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        """A fixed sentence, the picture, and the live widget; the first two are what a notebook keeps."""
        data, metadata = style.picture_bundle(self.figure, self.png, text=self.alt, alt=self.caption)
        data["application/vnd.jupyter.widget-view+json"] = {
            "version_major": 2,
            "version_minor": 0,
            "model_id": self.widget.model_id,
        }
        return data, metadata


def _control(name: str, values: Any) -> ipywidgets.Widget:
    """The ipywidgets control for one keyword of Explorer. Only what ipywidgets 7.7 and 8 share is used."""
    label = name.replace("_", " ")
    look = {"description": label, "style": {"description_width": "initial"}}
    if isinstance(values, ipywidgets.Widget):
        values.description = values.description or label
        return values
    if isinstance(values, bool):
        return ipywidgets.Checkbox(values, indent=False, **look)
    if isinstance(values, range) and len(values) > 0:
        low, high = min(values), max(values)
        # One drawing when the handle is let go, not a queue of them.
        step = {"step": abs(values.step), "continuous_update": False}
        return ipywidgets.IntSlider(value=values[0], min=low, max=high, **step, **look)
    if isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0:
        layout = ipywidgets.Layout(width="max-content")
        return ipywidgets.Dropdown(options=list(values), layout=layout, **look)
    raise ValueError(
        f"control {name!r}: got {values!r}, expected a non-empty range, a sequence of options, a bool or a widget"
    )


def _refusal(name: str, value: Any, control: ipywidgets.Widget) -> str:
    if hasattr(control, "options"):
        return f"set: {name}={value!r} is none of {list(control.options)}"
    if hasattr(control, "max"):
        return f"set: {name}={value!r} is not on the slider from {control.min} to {control.max}"
    return f"set: {name}={value!r} was refused by {type(control).__name__}"
