"""What can be done with attachments: switch them on and off, fold them into the weights, take them out again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from pefttutor.parts.attachment import Attachment, Attachments, attachments, check_apart, find, share_a_weight
from pefttutor.parts.checkpointing import close_to_checkpointing
from pefttutor.parts.layer_change import LayerChange
from pefttutor.parts.restoring import restored_on_error

__all__ = ["detach", "merge", "merged", "switch", "unmerge", "without"]


def merged(model: nn.Module) -> bool:
    """Whether one of the attachments is folded into the weights at the moment."""
    return any(attachment.merged for attachment in _there(model))


def switch(model: nn.Module, *names: str, train: tuple[str, ...] | None = None) -> nn.Module:
    """Let exactly the named attachments take effect from now on; without names, the model is the plain base.

    train: which of them train when the model is trained next; None lets all of them.

    They act in the order in which they were attached, whatever the order of the names, and of earlier switches.

    >>> from pefttutor import LoRA, trainable
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> for name in ("german", "bank"):
    ...     model = LoRA(r=2, target_modules=("0",)).attach(model, name=name)
    >>> trainable(switch(model, "german"))
    {'0.lora_A@german': 8, '0.lora_B@german': 8}

    Raises: ValueError for a name that isn't there, one that is merged, two that change the same tensor in place, one
        that computes with another one of them, or `train` that names others. Nothing has been changed then.
    """
    carried = _carried(model)
    chosen, learning = [find(model, name) for name in names], names if train is None else train
    if isinstance(train, str) or not set(learning) <= set(names):
        raise ValueError(f"train is {train!r}; expected some of the names that are switched on, {names!r}.")
    changing = [a for a in carried.by_name.values() if a.active != (a in chosen)]
    for attachment in changing:
        if attachment.merged:
            raise ValueError(
                f"{attachment.name!r} is merged into the weights: pefttutor.unmerge(model) first."
            )
    for i, attachment in enumerate(chosen):
        if inside := set(attachment.reads) & set(names):
            raise ValueError(
                f"{attachment.name!r} ({type(attachment.method).__name__}) computes with {min(inside)!r} already, and "
                "that would act twice: switch on one of the two."
            )
        check_apart(
            Attachments({a.name: a for a in chosen[:i]}, None, frozenset()), attachment, switched=True
        )
    for attachment in reversed([a for a in changing if a.active]):
        attachment.switch(False)
    for attachment in [a for a in changing if a in chosen]:
        attachment.switch(True)
    for part in [part for a in carried.by_name.values() if a.active and changing for part in a.parts]:
        part.in_turn()
    for attachment in chosen:
        attachment.trains = attachment.name in learning
    carried.apply(model)
    return model


class _Done(Exception):
    """The block is done, and everything goes back."""


@contextmanager
def without(model: nn.Module, chosen: Sequence[Attachment]) -> Iterator[None]:
    """Within the block these attachments take no effect; then all is back, down to the order of hooks."""
    parts = [part for attachment in chosen for part in attachment.parts]
    try:
        with restored_on_error(model):
            for part in reversed(parts):
                part.switch(False)
            try:
                yield
            finally:
                for part in parts:
                    part.switch(True)
            raise _Done
    except _Done:
        pass


# ---- folding into the weights, and taking out


@torch.inference_mode(mode=False)  # weights that are made here may be trained later
def merge(model: nn.Module, *names: str) -> nn.Module:
    """Fold attachments into the weights: the same function at the base's cost. Without names, all that are active.

    The base's weights are kept aside for `unmerge`. To keep the change for good, see `detach`.

    >>> from pefttutor import LoRA
    >>> model = LoRA(r=2, target_modules=("0",)).attach(nn.Sequential(nn.Linear(4, 4)))
    >>> merged(model), merged(merge(model)), merged(unmerge(model))
    (False, True, False)

    Raises: ValueError for a name that isn't there, an attachment that can't be folded, or one that shares a weight
        with another; RuntimeError for one that is merged already. Nothing has been changed then.
    """
    chosen = _chosen(model, names, [a for a in _there(model) if a.active])
    for attachment in chosen:
        if attachment.merged:
            raise RuntimeError(f"{attachment.name!r} is merged already: call unmerge(model) first.")
        if not attachment.active:
            raise ValueError(f"{attachment.name!r} is switched off: pefttutor.switch(model, …) first.")
        _check_foldable(model, attachment, chosen)
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise RuntimeError("merging inside torch.autocast would round the weights: merge outside of it.")
    for attachment in chosen:
        for part in attachment.parts:
            part.fold()
        attachment.merged = True
    return model


@torch.inference_mode(mode=False)  # weights that are made here may be trained later
def unmerge(model: nn.Module, *names: str) -> nn.Module:
    """Put the base's weights back, exactly as they were. Without names, for all that are merged.

    Raises: RuntimeError if nothing is merged; ValueError for a name that isn't there, or for one of two that were
        merged together into a weight to which they aren't simply added. Nothing has been changed then.
    """
    chosen = _chosen(model, names, [a for a in _there(model) if a.merged])
    for attachment in chosen:
        if not attachment.merged:
            raise RuntimeError(f"{attachment.name!r} isn't merged, so there is nothing to unmerge.")
        for other in _there(model):
            if other.merged and other not in chosen and share_a_weight(attachment, other):
                raise ValueError(
                    f"{attachment.name!r} and {other.name!r} are merged into a weight to which they aren't simply "
                    "added: unmerge both."
                )
    if not chosen:
        raise RuntimeError("this model isn't merged, so there is nothing to unmerge.")
    _unmerge(chosen)
    return model


def _unmerge(chosen: list[Attachment]) -> None:
    for attachment in reversed(chosen):
        for part in reversed(attachment.parts):
            part.unfold()
        attachment.merged = False


@torch.inference_mode(mode=False)  # weights that are made here may be trained later
def detach(model: nn.Module, *names: str, keep: bool = False) -> nn.Module:
    """Take attachments out of the model again, all of them without names.

    The base is then, bit for bit, what it was before. With `keep=True` the base keeps what was learned: the change is
    folded in for good, and the model is a plain one that `save_pretrained` writes as such.

    >>> from pefttutor import LoRA
    >>> model = LoRA(r=2, target_modules=("0",)).attach(nn.Sequential(nn.Linear(4, 4)))
    >>> type(model[0]).__name__, type(detach(model)[0]).__name__
    ('AdaptedLinear', 'Linear')

    Raises: ValueError for a name that isn't there, one that another attachment computes with, or with `keep` one that
        can't be folded in; RuntimeError if nothing is attached. Nothing has been changed then.
    """
    carried = _carried(model)
    chosen = _chosen(model, names, list(carried.by_name.values()))
    for other in [a for a in carried.by_name.values() if a not in chosen]:
        if read := [attachment.name for attachment in chosen if attachment.name in other.reads]:
            raise ValueError(
                f"{other.name!r} ({type(other.method).__name__}) computes with {read[0]!r}: take that one out first, "
                f"or both, pefttutor.detach(model, {other.name!r}, {read[0]!r})."
            )
    through = {name for attachment in chosen for name in attachment.reads}  # they act in another one
    kept = [attachment for attachment in chosen if keep and attachment.name not in through]
    for attachment in kept:
        _check_foldable(model, attachment, chosen, for_good=True)
    if unmerged := [attachment.name for attachment in kept if not attachment.merged]:
        merge(model, *unmerged)
    for attachment in [*kept, *(a for a in reversed(chosen) if a not in kept)]:
        if attachment in kept:
            for part in attachment.parts:
                part.keep(model)
        elif attachment.merged:
            _unmerge([attachment])
        if attachment.active and attachment not in kept:
            attachment.switch(False)
        for part in reversed(attachment.parts):
            part.remove()
        del carried.by_name[attachment.name]
    carried.apply(model)
    if not carried.by_name:
        close_to_checkpointing(model)
        del vars(model)["_pefttutor"]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in carried.trained)
    return model


def _there(model: nn.Module) -> list[Attachment]:
    carried = attachments(model)
    return list(carried.by_name.values()) if carried else []


def _carried(model: nn.Module) -> Attachments:
    carried = attachments(model)
    if carried is None:
        raise RuntimeError("no method is attached to this model: call attach(model) of a method first.")
    return carried


def _chosen(model: nn.Module, names: tuple[str, ...], otherwise: list[Attachment]) -> list[Attachment]:
    _carried(model)
    named = [find(model, name) for name in names]
    return [a for a in _there(model) if a in named] if names else otherwise  # in the order of attaching


def _check_foldable(
    model: nn.Module, attachment: Attachment, together: list[Attachment], *, for_good: bool = False
) -> None:
    """Raise ValueError if a part can't be folded, or if the weights would then hold what another one builds on.

    together: what is folded along; changes of one layer are folded in the order in which they act. for_good: also one
    that is switched off is in the way, since it would come back to weights that it doesn't know.
    """
    kind = type(attachment.method).__name__
    for part in attachment.parts:
        try:
            part.check_foldable()
        except ValueError as error:
            raise ValueError(f"{attachment.name!r} ({kind}) can't be merged: {error}") from None
    for other in _there(model):
        if other is attachment or not (other.active or for_good) or not share_a_weight(attachment, other):
            continue
        if other in together and not share_a_weight(attachment, other, besides=LayerChange):
            continue
        way_out = "take the other one out first" if for_good else "switch the other one off first"
        raise ValueError(
            f"{attachment.name!r} ({kind}) and {other.name!r} ({type(other.method).__name__}) share a weight and "
            f"aren't simply added to it, so neither can be merged alone: {way_out}."
        )
