"""What `diagnose` says of one attachment, without running the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from pefttutor.diagnosis.table import LOOK, NOT_CHECKED, OK, WRONG, Row, listed
from pefttutor.parts.attachment import Attachment
from pefttutor.parts.freezing import Whole
from pefttutor.parts.layer_change import LayerChange
from pefttutor.parts.movement import Movement, movements

__all__ = ["attached_row", "moved_row", "saved_row", "schedule_rows"]


def attached_row(attachment: Attachment, there: Sequence[Attachment]) -> Row:
    """What is attached, to how many layers, and whether it takes effect."""
    trained = attachment.trained()
    values = f"{len(trained)} tensors with {sum(p.numel() for p in trained):,} values train"
    found = f"{type(attachment.method).__name__}{_targets(attachment)}: {values}"
    if attachment.merged:
        return Row("attached", f"{found}; merged", OK, "pefttutor.unmerge(model) before training or saving")
    if attachment.active:
        return Row("attached", found, OK)
    alone = not any(other.active for other in there)
    return Row(
        "attached", f"{found}; switched off{': the model is the plain base' if alone else ''}",
        WRONG if alone else OK, f"pefttutor.switch(model, {attachment.name!r}) to let it act",
    )  # fmt: skip


def _targets(attachment: Attachment) -> str:
    """How often each of target_modules was found."""
    paths = [part.path for part in attachment.parts if isinstance(part, LayerChange)]
    weights = [getattr(part, "weight_name", "").rpartition(".")[0] for part in attachment.parts]
    paths += [path for path in weights if path]
    names = getattr(attachment.method, "target_modules", None) or ()
    names = [] if isinstance(names, str) else names
    each = ", ".join(f"{name} {sum(f'.{path}'.endswith(f'.{name}') for path in paths)}" for name in names)
    return f" on {len(paths)} layers{f' ({each})' if each else ''}" if paths else ""


def moved_row(attachment: Attachment) -> Row:
    """How many of the trained tensors have moved from their start, and why not."""
    if not attachment.trained():
        return Row("moved", "nothing of it trains: it acts as it is", OK)
    found = movements(attachment)
    known = [movement for movement in found if movement.moved is not None]
    still = [movement for movement in known if not movement.moved]
    if not known:
        return Row(
            "moved", "the start of what trains isn't known", NOT_CHECKED, "attach it again to have it noted"
        )
    of = f"{len(known)} tensors"
    if len(still) == len(known):
        return Row("moved", f"none of {of} has moved from its start", WRONG, _why(still, none=True))
    if still:
        names = listed([movement.name for movement in still])
        return Row(
            "moved", f"still at the start: {names} ({len(still)} of {of})", LOOK, _why(still, none=False)
        )
    counted = [movement.values for movement in known if movement.values is not None]
    total = sum(movement.parameter.numel() for movement in known)
    values = f" ({sum(counted):,} of {total:,} values)" if len(counted) == len(known) else ""
    return Row("moved", f"all {of} have moved from their start{values}", OK)


def _why(still: Sequence[Movement], *, none: bool) -> str:
    """The likely cause. none: not a single tensor has moved."""
    half = [m.parameter.dtype for m in still if m.parameter.dtype.itemsize < 4]
    uncalled = [m.part.path for m in still if isinstance(m.part, LayerChange) and not m.part.called]
    if half:
        return f"a small step is rounded away in {half[0]}: keep what trains in float32; or train it: pefttutor.fit"
    if none:
        return "train it: pefttutor.fit(model, …); else look whether the optimizer has these tensors"
    if uncalled:
        return f"{uncalled[0]!r} was never called: leave it out, unless other data calls it (an expert)"
    return "no gradient has come to them: does the loss depend on them for this data?"


def schedule_rows(model: nn.Module, attachment: Attachment) -> list[Row]:
    """Whether a method with a schedule has come to its end; no row for one without."""
    unfinished = getattr(attachment.method, "unfinished", None)
    if unfinished is None:
        return []
    found, _, advice = (unfinished(model) or "").partition(": ")
    return [Row("schedule", found, LOOK, advice) if found else Row("schedule", "it has come to its end", OK)]


def saved_row(model: nn.Module, attachment: Attachment) -> Row:
    """What `save` would write, and whether an embedding is among it that outweighs all else."""
    try:
        tensors = attachment.tensors(model)
    except ValueError as error:
        return Row("saved", str(error), WRONG, "attach to the model as it is now, and train")
    sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    total = sum(sizes.values())
    found = f"{len(sizes)} tensors, {total / 1e6:,.3f} MB"
    others = [part for part in attachment.parts if part.trained() and not isinstance(part, Whole)]
    fully = {id(p) for part in attachment.parts if isinstance(part, Whole) for p in part.trained()}
    tables = fully & {id(table) for table in _tables(model)}
    names = [name for name, p in model.named_parameters() if id(p) in tables]
    share = sum(sizes[name] for name in names) / max(1, total)
    if others and share > 0.5:
        found += f", of which {listed(names)}, an embedding or tied to one, is {share:.0%}"
        return Row(
            "saved", found, LOOK, "take it out of modules_to_save, unless new tokens are to be learned"
        )
    return Row("saved", found, OK)


def _tables(model: Any) -> Iterable[Tensor]:
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        try:
            weight = getattr(getattr(model, ask)(), "weight", None)
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(weight, Tensor):
            yield weight
