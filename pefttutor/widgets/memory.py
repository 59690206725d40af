"""Where the memory goes: `memory.figure` for one setting, `memory` with controls for all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import ipywidgets

from pefttutor.memory.attention import ATTENTION
from pefttutor.memory.checks import OPTIMIZERS
from pefttutor.widgets.explorer import Explorer
from pefttutor.widgets.memory_figures import draw_memory
from pefttutor.widgets.memory_settings import GPUS, METHODS, MODELS, PRECISIONS, Setting, advice, needs
from pefttutor.widgets.style import Picture, paper

__all__ = ["memory"]

_ALT = "The memory of one training step, stacked, against that of GPUs, and what to change to make it fit."
_FULL = "full fine-tuning"
_CHOICES = {
    "batch_size": (1, 2, 4, 8, 16, 32, 64),
    "length": (128, 256, 512, 1024, 2048, 4096, 8192),
    "optimizer": tuple(OPTIMIZERS),
    "attention": ATTENTION,
}


class _Memory:
    """`widgets.memory.figure(model, method)` is the static picture, `widgets.memory()` the explorer.

    >>> memory.figure(model="GPT-2", gpu="TPU")
    Traceback (most recent call last):
    ValueError: gpu is 'TPU'; it can be T4, RTX 4090, A100 80 GB, H100
    """

    def figure(
        self, *, gpu: str = "A100 80 GB", methods: Mapping[str, Any] | None = None, **setting: Any
    ) -> Picture:
        """One setting against the lines of GPUs. The arguments are the explorer's controls.

        Raises: ValueError for a name that isn't among the choices; what `memory.estimate` raises.
        """
        chosen, gpu, methods = _checked(gpu, methods, setting)
        with paper():
            return _draw(chosen, gpu, methods)

    def __call__(
        self, *, gpu: str = "A100 80 GB", methods: Mapping[str, Any] | None = None, **setting: Any
    ) -> Explorer:
        """Choose model, method, precision, batch, length, optimizer, attention and checkpointing; see if it fits.

            widgets.memory(model="Llama-2-7B", gpu="RTX 4090")

        methods: {name: method}, None for full fine-tuning; without it, full fine-tuning, LoRA and parts of the model.
        Everything else sets where a control starts. Estimates: nothing is allocated (`pefttutor.memory.estimate`).

        Raises: what `figure` raises.
        """
        chosen, gpu, methods = _checked(gpu, methods, setting)
        options = _options(methods) | {"gpu": tuple(GPUS)}
        start = asdict(chosen) | {"gpu": gpu}
        controls: dict[str, Any] = {
            name: ipywidgets.Dropdown(
                options=list(choices), value=start[name], layout={"width": "max-content"},
                style={"description_width": "initial"},
            )
            for name, choices in options.items()
        }  # fmt: skip
        controls["checkpointing"] = chosen.checkpointing

        def draw(gpu: str, **values: Any) -> Picture:
            return _draw(Setting(**values), gpu, methods)

        return Explorer(draw, _ALT, **controls)


def _draw(setting: Setting, gpu: str, methods: Mapping[str, Any]) -> Picture:
    names = dict.fromkeys(name for name in (_FULL, setting.method) if name in methods)
    bars = {setting.method: needs(setting, methods)}
    if len(names) == 2 and "quantization" not in PRECISIONS[setting.precision]:
        values = asdict(setting) | {"method": _FULL}
        bars = {_FULL: needs(Setting(**values), methods)} | bars
    return draw_memory(setting, bars, gpu, advice(setting, methods, GPUS[gpu]))


def _options(methods: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    return {"model": tuple(MODELS), "method": tuple(methods), "precision": tuple(PRECISIONS), **_CHOICES}


def _checked(gpu: str, methods: Any, setting: dict[str, Any]) -> tuple[Setting, str, Mapping[str, Any]]:
    methods = METHODS if methods is None else methods
    chosen = {"model": "Llama-2-7B", "method": list(methods)[min(1, len(methods) - 1)], **setting}
    options = _options(methods) | {"gpu": tuple(GPUS), "checkpointing": (False, True)}
    for name, value in {**chosen, "gpu": gpu}.items():
        if name not in options:
            raise ValueError(f"no control is called {name!r}; there are {', '.join(options)}")
        if value not in options[name]:
            raise ValueError(f"{name} is {value!r}; it can be {', '.join(map(str, options[name]))}")
    return Setting(**chosen), gpu, methods


memory = _Memory()
