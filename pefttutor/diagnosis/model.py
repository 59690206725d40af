"""What `diagnose` says of the whole model, without running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.data.stopping import padding_learned
from pefttutor.diagnosis.table import LOOK, NOT_CHECKED, OK, WRONG, Row, listed
from pefttutor.parts.attachment import Attachment, Attachments, attachments, base_of
from pefttutor.parts.fingerprint import problems
from pefttutor.parts.movement import movements
from pefttutor.parts.part import Part

__all__ = ["finite_row", "flags_row", "frozen_row", "head_rows", "labels_rows", "plain_rows"]

AGAIN = "load the base again, and attach to it"
HEADS = ("score", "classifier", "qa_outputs")  # what transformers calls a head for classes


def finite_row(model: nn.Module) -> Row:
    """Whether NaN or infinity is anywhere."""
    bad = [name for name, p in model.named_parameters() if p.is_floating_point() and not p.isfinite().all()]
    if bad:
        advice = "load what was saved before, and train with a smaller lr"
        return Row("finite", f"NaN or infinity in {listed(bad)}", WRONG, advice)
    return Row("finite", f"all {sum(p.numel() for p in model.parameters()):,} values are numbers", OK)


def flags_row(model: nn.Module, carried: Attachments) -> Row:
    """Whether requires_grad says what the attachments say."""
    trains = {id(p) for a in carried.learning() for p in a.trained()}
    still = {id(m.parameter) for a in carried.learning() for m in movements(a) if m.moved is False}
    named = dict(model.named_parameters())
    extra = [name for name, p in named.items() if p.requires_grad and id(p) not in trains]
    lost = [name for name, p in named.items() if not p.requires_grad and id(p) in trains & still]
    if extra:
        advice = "parameter.requires_grad_(False), or name their module in modules_to_save"
        return Row("flags", f"trains, and belongs to no attachment: {listed(extra)}", WRONG, advice)
    if lost:
        advice = "parameter.requires_grad_(True), or pefttutor.switch(model, …) once more"
        return Row("flags", f"should train, and requires no gradient: {listed(lost)}", WRONG, advice)
    return Row("flags", "requires_grad is as the attachments say", OK)


def frozen_row(model: nn.Module, carried: Attachments, base: nn.Module | None) -> Row:
    """Whether what isn't trained is as it was."""
    written = {id(t) for a in carried.by_name.values() for part in a.parts for t in _written(a, part)}
    added = {id(t) for a in carried.by_name.values() for part in a.parts for t in part.added()}
    names = [name for name, tensor in _state(model).items() if id(tensor) not in written | added]
    if not names:
        return Row("frozen", "nothing: every tensor of the base trains, at least in part", OK)
    if base is not None:
        return _compared(model, base, names)
    if carried.base is None:
        return Row("frozen", "the base isn't known", NOT_CHECKED, "give base=, the model before training")
    changed = problems(base_of(model, without=()), carried.base)
    if changed:
        return Row("frozen", f"{'; '.join(changed[:3])} ({len(changed)} in all)", WRONG, AGAIN)
    return Row(
        "frozen", f"{len(names)} tensors are as they were, by 8 values of each; base= compares all", OK
    )


def _written(attachment: Attachment, part: Part) -> list[Tensor]:
    return part.touched() if attachment.merged else part.changed_in_place()


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and saved buffer."""
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return {**dict(model.named_parameters()), **buffers}


def _compared(model: nn.Module, base: nn.Module, names: Sequence[str]) -> Row:
    """Those of the tensors that the base has too, value by value."""
    now, before = _state(model), _state(base)
    shared = [name for name in names if name in before]
    changed = [name for name in shared if not _equal(now[name], before[name])]
    if not shared:
        return Row("frozen", "base= has none of these tensors", WRONG, "give the model before training")
    if changed:
        found = f"not the base's: {listed(changed)} ({len(changed)} of {len(shared)} tensors)"
        return Row("frozen", found, WRONG, f"{AGAIN}; or is base= another model?")
    return Row("frozen", f"{len(shared)} tensors are the base's, in all values", OK)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.detach(), other.detach().to(one.device, one.dtype))


def plain_rows(model: nn.Module, base: nn.Module | None) -> list[Row]:
    """A model without attachments: fully fine-tuned, or a base to which nothing was attached."""
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    found = f"no method; {len(trains)} of {sum(1 for _ in model.parameters())} tensors train"
    if not trains or base is None:
        advice = "attach a method or load an adapter; after full fine-tuning give base=, the model before it"
        return [Row("attached", found, LOOK, advice)]
    before, now = _state(base), _state(model)
    moved = [name for name in trains if name in before and not _equal(now[name], before[name])]
    row = Row("moved", f"{len(moved)} of {len(trains)} tensors aren't the base's any more", OK)
    if not moved:
        row = replace(row, verdict=WRONG, advice="train it: pefttutor.fit(model, …)")
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    rows = [Row("attached", f"{found}: full fine-tuning", OK), row]
    return [*rows, _compared(model, base, frozen)] if frozen else rows


def head_rows(model: nn.Module) -> list[Row]:
    """Whether a head that was drawn at random is frozen as it was drawn."""
    carried = attachments(model)
    parts = [part for a in carried.by_name.values() for part in a.parts] if carried else []
    learned = {id(tensor) for part in parts for _, tensor in part.saved()}
    named = model.named_parameters()
    frozen = {name: p for name, p in named if not p.requires_grad and id(p) not in learned}
    advice = "name it in the method's modules_to_save, or train it (pefttutor.fit_head) before attaching"
    drawn = vars(model).get("_drawn", {})
    random = [name for name, p in frozen.items() if name in drawn and _equal(p, drawn[name])]
    if random:
        found = f"{listed(random)} was drawn at random, never trained, and is frozen"
        return [Row("head", found, WRONG, advice)]
    biases = [n for n in frozen if n.endswith("bias") and n.partition(".")[0] in HEADS]
    zero = [name for name in biases if not frozen[name].any()]
    found = f"{listed(zero)} is zero, as in a head just drawn, and frozen"
    return [Row("head", found, LOOK, advice)] if zero else []


def labels_rows(inputs: Mapping[str, Any] | None) -> list[Row]:
    """Whether padding is learned."""
    padding = padding_learned(inputs or {})
    found = f"{padding} labels stand on padding (attention_mask 0)"
    advice = "let them be −100, as pefttutor.data.collate does"
    return [Row("labels", found, WRONG, advice)] if padding else []
