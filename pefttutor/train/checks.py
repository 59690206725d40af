"""What `fit` refuses, before its first step: bad settings, and a state that isn't this run's."""

import math
from pathlib import Path
from typing import Any

from torch import nn

from pefttutor.method import merged

SCHEDULES = ("linear", "constant", "cosine")


def check_settings(
    model: nn.Module, settings: dict[str, Any], checkpoint: str | Path | None, resume: bool
) -> None:
    """Raise ValueError with what was given and what is possible."""
    given = settings
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "nothing trains: no parameter of the model has requires_grad. Attach a method first, "
            "or call model.requires_grad_(True) for full fine-tuning."
        )
    if merged(model):
        raise ValueError(
            "the method is merged into the weights, so that what trains has no effect: unmerge it first"
        )
    if given["steps"] is not None and given["epochs"] is not None:
        raise ValueError(f"steps={given['steps']} and epochs={given['epochs']} were both given; choose one")
    for name in ("steps", "epochs", "batch_size", "accumulate", "evaluate_every", "lr", "max_grad_norm"):
        whole = name not in ("epochs", "lr", "max_grad_norm")
        value = given[name]
        if value is None and name not in ("batch_size", "accumulate", "lr"):
            continue
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not number or not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value!r}, expected a positive {'whole ' if whole else ''}number")
    if not 0 <= given["warmup"] < 1:
        raise ValueError(f"warmup={given['warmup']}, expected a fraction of the steps: 0 ≤ warmup < 1")
    if given["weight_decay"] < 0:
        raise ValueError(f"weight_decay={given['weight_decay']}, expected 0 or more")
    if given["schedule"] not in SCHEDULES:
        raise ValueError(f"schedule={given['schedule']!r}, expected one of {', '.join(SCHEDULES)}")
    if resume and checkpoint is None:
        raise ValueError("resume=True needs checkpoint=, the folder that the interrupted run wrote to")


def check_resumable(saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise ValueError when a saved run had other settings: going on would not be the same run."""
    different = [f"{k} was {saved.get(k)!r}, now {v!r}" for k, v in given.items() if saved.get(k) != v]
    if different:
        raise ValueError(
            f"the saved run had other settings: {'; '.join(different)}. Use those, or resume=False"
        )
