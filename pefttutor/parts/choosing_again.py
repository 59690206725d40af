"""Let an attachment train other entries than before: a new choice, or the entries that whole weights had learned."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from pefttutor.kernels.flat_entries import read
from pefttutor.parts.attachment import Attachment, attachments
from pefttutor.parts.entries import Entries, Settled, choose
from pefttutor.parts.part import Part
from pefttutor.parts.restoring import restored_on_error

__all__ = ["rechoose", "settle_as"]


def rechoose(model: nn.Module, attachment: Attachment, choice: Callable[[], Mapping[str, Tensor]]) -> None:
    """Let an attachment train other entries from now on; what it has trained so far stays as it became.

    `choice` is asked while the weights hold what was learned, and nothing stands in their place.

    Raises: what `choice` and `train_entries` raise; then the choice is the old one.
    """
    _check_acting(attachment)
    before = attachment.parts
    old = [part for part in before if isinstance(part, Entries)]
    for part in old:
        part.fold()
    try:
        chosen = choice()
    finally:
        for part in old:
            part.unfold()
    attachment.parts = [part for part in before if type(part) is Settled]
    try:
        with restored_on_error(model):
            attachment.parts += [part.settle() for part in old]
            choose(model, attachment, chosen)
    except BaseException:
        attachment.parts = before
        raise
    attachment.parts += [part for part in before if not isinstance(part, Settled)]
    carried = attachments(model)
    assert carried is not None
    carried.apply(model)


def settle_as(
    model: nn.Module,
    attachment: Attachment,
    old: Collection[Part],
    chosen: Mapping[str, Tensor],
    changes: Mapping[str, Tensor],
    modules_to_save: Collection[str] = (),
) -> None:
    """In the place of the parts `old`: the chosen entries, and `modules_to_save`, from the base's own values on.

    changes: by the name of a weight what the entries get beyond that: what has been learned for them.

    Raises: what `train_entries` raises; then the attachment is as it was.
    """
    _check_acting(attachment)
    before = attachment.parts
    for part in reversed(list(old)):
        part.switch(False)
    attachment.parts = []
    try:
        with restored_on_error(model):
            for part in old:
                part.remove()
            choose(model, attachment, chosen, modules_to_save)
    except BaseException:
        attachment.parts = before
        for part in old:
            part.switch(True)
        raise
    with torch.no_grad():
        for part in attachment.parts:
            if isinstance(part, Entries) and part.weight_name in changes:
                part.values.add_(read(changes[part.weight_name].to(part.values), part.index))
                part.after_step()
    attachment.parts += [part for part in before if part not in old]
    carried = attachments(model)
    assert carried is not None
    carried.apply(model)


def _check_acting(attachment: Attachment) -> None:
    if attachment.merged or not attachment.active:
        raise ValueError(
            f"{attachment.name!r} is {'merged' if attachment.merged else 'switched off'}: "
            f"{'pefttutor.unmerge(model)' if attachment.merged else 'pefttutor.switch(model, …)'} first."
        )
