"""What `fit` refuses, before its first step: bad settings, bad data, and a state that isn't this run's."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pefttutor.encoding import IGNORED, predicts_next
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


def check_examples(model: nn.Module, examples: Sequence[Any], name: str, *, needs_labels: bool) -> None:
    """Raise ValueError for an empty data set and for labels that the model can't be trained on.

    Cost: one pass over the labels, no forward.
    """
    if len(examples) == 0:
        raise ValueError(f"{name} is empty; expected at least one example")
    first = examples[0]
    if not isinstance(first, dict) or not all(isinstance(v, Tensor) for v in first.values()):
        kind = sorted(first) if isinstance(first, dict) else type(first).__name__
        raise ValueError(
            f"{name}[0] is {kind}; expected a dict of tensors. "
            "Make them with pefttutor.data.encode(split, tokenizer)."
        )
    if not needs_labels:
        return
    classes, words = _limits(model)
    shifted = predicts_next(model)
    for i in range(len(examples)):
        example = examples[i]
        if "labels" not in example:
            raise ValueError(f"{name}[{i}] has no labels, only {', '.join(example)}; or give loss=")
        labels, ids = example["labels"], example.get("input_ids")
        where = f"{name}[{i}]"
        if ids is not None:
            _check_range(ids, 0, words, f"{where}: input_ids", "tokens in the model's vocabulary")
        if labels.is_floating_point():
            continue
        if labels.ndim == 0:
            _check_range(labels, 0, classes, f"{where}: the label", "classes of the model")
            continue
        if ids is not None and labels.shape != ids.shape:
            raise ValueError(
                f"{where}: labels have the length {len(labels)}, input_ids {len(ids)}; "
                f"expected one label a token ({IGNORED} where none counts) or a single class"
            )
        counted = labels[labels != IGNORED]
        highest = classes if type(model).__name__.endswith("ForTokenClassification") else words
        _check_range(counted, 0, highest, f"{where}: a label", "outputs of the model")
        if not (labels[1:] if shifted else labels).ne(IGNORED).any():
            raise ValueError(
                f"{where} has no label to learn from: all are {IGNORED}"
                f"{' after the first position, which has no prediction' if shifted else ''}"
            )


def _limits(model: Any) -> tuple[int | None, int | None]:
    """How many classes and how many words the model knows; None where it doesn't say."""
    config = getattr(model, "config", None)
    classifies = type(model).__name__.endswith("Classification")
    return getattr(config, "num_labels", None) if classifies else None, getattr(config, "vocab_size", None)


def _check_range(values: Tensor, low: int, high: int | None, what: str, of_what: str) -> None:
    if high is None or values.numel() == 0:
        return
    smallest, largest = int(values.min()), int(values.max())
    if smallest < low or largest >= high:
        wrong = smallest if smallest < low else largest
        raise ValueError(f"{what} is {wrong}, expected {low} to {high - 1} (there are {high} {of_what})")


def check_resumable(saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise ValueError when a saved run had other settings: going on would not be the same run."""
    different = [f"{k} was {saved.get(k)!r}, now {v!r}" for k, v in given.items() if saved.get(k) != v]
    if different:
        raise ValueError(
            f"the saved run had other settings: {'; '.join(different)}. Use those, or resume=False"
        )
