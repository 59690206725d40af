"""What `fit` refuses, before its first step: bad settings, and a state that isn't this run's."""

import dataclasses
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from pefttutor.method import attached
from pefttutor.parts.attachment import base_of
from pefttutor.parts.fingerprint import check_base, describe_base, problems

SCHEDULES = ("linear", "constant", "cosine")


def check_settings(
    model: nn.Module, settings: dict[str, Any], checkpoint: str | Path | None, resume: bool
) -> None:
    """Raise ValueError with what was given and what is possible.

    >>> check_settings(nn.Linear(1, 1), {"steps": 5, "epochs": 1}, None, False)
    Traceback (most recent call last):
    ValueError: steps=5 and epochs=1 were both given; choose one
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "nothing trains: no parameter of the model has requires_grad. Attach a method first, "
            "or call model.requires_grad_(True) for full fine-tuning."
        )
    for attachment in attached(model).values():
        attachment.tensors(model)  # raises if a layer was replaced after attaching
    merged = [a.name for a in attached(model).values() if a.merged and a.learns]
    if merged:
        raise ValueError(
            f"{merged[0]!r} is merged into the weights, so that what trains has no effect: unmerge it first"
        )
    if settings["steps"] is not None and settings["epochs"] is not None:
        raise ValueError(
            f"steps={settings['steps']} and epochs={settings['epochs']} were both given; choose one"
        )
    for name in ("steps", "epochs", "batch_size", "accumulate", "evaluate_every", "lr", "max_grad_norm"):
        whole = name not in ("epochs", "lr", "max_grad_norm")
        value = settings[name]
        if value is None and name not in ("batch_size", "accumulate", "lr"):
            continue
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not number or not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value!r}, expected a positive {'whole ' if whole else ''}number")
    if not 0 <= settings["warmup"] < 1:
        raise ValueError(f"warmup={settings['warmup']}, expected a fraction of the steps: 0 ≤ warmup < 1")
    if settings["weight_decay"] < 0:
        raise ValueError(f"weight_decay={settings['weight_decay']}, expected 0 or more")
    if settings["schedule"] not in SCHEDULES:
        raise ValueError(f"schedule={settings['schedule']!r}, expected one of {', '.join(SCHEDULES)}")
    if resume and checkpoint is None:
        raise ValueError("resume=True needs checkpoint=, the folder that the interrupted run wrote to")


def described(model: nn.Module, written: Collection[str] = ()) -> dict[str, Any]:
    """What a run is about, beside its settings: the attached methods, and the base that they are on.

    >>> from pefttutor.selective import BitFit
    >>> about = described(BitFit().attach(nn.Linear(2, 2)))
    >>> about["attachments"]["default"]["method"], list(about["base"])
    ('BitFit', ['bias', 'weight'])

    written: parameters that the run has changed, trained or not, as ReLoRA does: they are in the saved state, as are
        all buffers, which a step may move. "held" is what the methods hold and no step changes, as adapters that are
        fused are held.
    """
    methods = {
        name: {"method": type(a.method).__name__, "fields": dataclasses.asdict(a.method), "learns": a.learns}
        for name, a in attached(model).items()
    }
    buffers = [name for name, _ in model.named_buffers()]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    saved = buffers if methods else [*trained, *written, *buffers]
    added = {id(t) for a in attached(model).values() for part in a.parts for t in part.added()}
    base = [name for name, p in model.named_parameters() if id(p) not in added]
    held = describe_base(model, without={*base, *trained, *written, *buffers})
    return json.loads(
        json.dumps({"attachments": methods, "base": base_of(model, without=saved), "held": held})
    )


def check_resumable(saved: dict[str, Any], settings: dict[str, Any], model: nn.Module) -> None:
    """Raise ValueError when a saved run had other settings, methods or another base: it would not be the same run.

    >>> check_resumable({"settings": {"lr": 0.1}}, {"lr": 0.2}, nn.Linear(1, 1))
    Traceback (most recent call last):
    ValueError: the saved run had other settings: lr was 0.1, now 0.2. Use those, or resume=False
    """
    then = saved["settings"]
    different = [f"{k} was {then.get(k)!r}, now {v!r}" for k, v in settings.items() if then.get(k) != v]
    if different:
        raise ValueError(
            f"the saved run had other settings: {'; '.join(different)}. Use those, or resume=False"
        )
    if "attachments" not in saved:
        return  # written before this was noted
    now = described(model)
    if saved["attachments"] != now["attachments"]:
        raise ValueError(
            f"the saved run trained {saved['attachments'] or 'without a method'}, and this model carries "
            f"{now['attachments'] or 'none'}. Attach the same methods with the same settings, or use resume=False"
        )
    check_base({name: values for name, values in now["base"].items() if name in saved["base"]}, saved["base"])
    held = saved.get("held", {})  # files of before don't have it
    if other := problems({name: values for name, values in now["held"].items() if name in held}, held):
        raise ValueError(
            f"the saved run stood on other frozen values of the attached methods: {'; '.join(other[:3])}. Load the "
            "adapters that it was started with, or use resume=False"
        )
