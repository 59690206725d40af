"""Whether an attachment changes what a model says: the model with it and without it, on the same inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.data.batches import collator
from pefttutor.data.trial import trial
from pefttutor.diagnosis.table import LOOK, NOT_CHECKED, OK, WRONG, Row, listed
from pefttutor.parts.attachment import Attachment
from pefttutor.parts.called import own_tokens
from pefttutor.parts.layer_change import LayerChange
from pefttutor.parts.switching import without

__all__ = ["effects", "inputs_of"]

FIRST = 8  # examples
GIVEN = "examples= of what it was trained on"


def inputs_of(model: nn.Module, examples: Sequence[Any] | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the model is called with: a batch, some of the examples, or tokens of its own; None where it reads none."""
    if examples is None:
        return own_tokens(model)
    if not isinstance(examples, Mapping):
        examples = collator(model)([examples[i] for i in range(min(FIRST, len(examples)))])
    takes = inspect.signature(model.forward).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        examples = {key: value for key, value in examples.items() if key in takes} or examples
    device = next(model.parameters()).device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in examples.items()}


def effects(
    model: nn.Module, there: Sequence[Attachment], inputs: dict[str, Any] | None, *, own: bool
) -> dict[str, list[Row]]:
    """For each attachment what it changes, and whether its layers are called. own: the inputs are the model's own.

    Raises: ValueError for inputs that aren't the model's own and that it can't be called with.
    """
    acting = [a for a in there if a.active and not a.merged]
    why = {a.name: "merged: unmerge it to see it" if a.merged else "switched off" for a in there}
    silent = "the model can't be called with tokens alone"
    rows = {name: [Row("effect", reason, NOT_CHECKED)] for name, reason in why.items()}
    unknown = rows | {a.name: [Row("effect", silent, NOT_CHECKED, f"give {GIVEN}")] for a in acting}
    if not acting or inputs is None:
        return unknown
    try:
        return rows | _compared(model, acting, inputs, own=own)
    except Exception as error:
        if own:
            return unknown
        raise ValueError(
            f"examples: a {type(model).__name__} can't be called with {sorted(inputs)} "
            f"({type(error).__name__}: {error}); give what it was trained on."
        ) from error


def _compared(
    model: nn.Module, acting: Sequence[Attachment], inputs: dict[str, Any], *, own: bool
) -> dict[str, list[Row]]:
    layers = {a.name: [part for part in a.parts if isinstance(part, LayerChange)] for a in acting}
    before = [(part, part.called) for parts in layers.values() for part in parts]
    rows = {}
    try:
        with trial(model):
            for part, _ in before:
                part.called = False
            on = _said(model, inputs)
            called = {part for part, _ in before if part.called}
            for attachment in acting:
                with without(model, [attachment]):
                    rows[attachment.name] = [_effect_row(on, _said(model, inputs), own=own)]
    finally:
        for part, was in before:
            part.called = was
    for name, parts in layers.items():
        missed = [part.path for part in parts if part not in called]
        if missed:
            found = f"this input doesn't call {listed(missed)} ({len(missed)} of its {len(parts)} layers)"
            advice = "take them out of target_modules, unless another input calls them (experts)"
            rows[name].append(Row("called", found, LOOK, advice))
    return rows


def _effect_row(on: Tensor, off: Tensor, *, own: bool) -> Row:
    if torch.equal(on, off):
        if own:
            return Row("effect", "none on three tokens of its own", NOT_CHECKED, f"give {GIVEN}")
        advice = "look at what has moved, and which layers are called"
        return Row("effect", "the output for the examples is the base's, bit for bit", WRONG, advice)
    far, spread = (on.double() - off.double()).abs().max().item(), off.double().std().item()
    return Row(
        "effect", f"moves the output by up to {far:.2g} (its standard deviation without: {spread:.2g})", OK
    )


def _said(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    output = model(**inputs)
    if isinstance(output, Tensor):
        return output
    said = getattr(output, "logits", None)
    return output[0] if said is None else said
