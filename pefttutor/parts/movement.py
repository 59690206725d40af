"""How far what trains has come from its start: from the copy that a part keeps, or else from a checksum at attach."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from pefttutor.parts.attachment import Attachment
from pefttutor.parts.entries import Entries
from pefttutor.parts.fingerprint import checksum
from pefttutor.parts.freezing import InPlace, Whole
from pefttutor.parts.part import Part

__all__ = ["Movement", "movements"]


@dataclass(frozen=True)
class Movement:
    """One trained tensor: whether it has moved (None: that can't be told), and how many of its values, if known."""

    name: str
    parameter: nn.Parameter
    part: Part
    moved: bool | None
    values: int | None = None


def movements(attachment: Attachment) -> list[Movement]:
    """What an attachment trains, each with whether it has moved since it was attached, or chosen.

    >>> from pefttutor import LoRA, attached
    >>> model = LoRA(r=1, target_modules=("0",)).attach(nn.Sequential(nn.Linear(2, 2)))
    >>> _ = nn.init.ones_(model[0].lora_B)
    >>> [(found.name, found.moved) for found in movements(attached(model)["default"])]
    [('0.lora_A', False), ('0.lora_B', True)]

    Cost: one pass over what trains.
    """
    found = []
    for part in attachment.parts:
        keys = {id(tensor): key for key, tensor in part.saved()}
        kept = _kept(part)
        if kept is None:
            found += _by_checksum(attachment, part, keys)
            continue
        for i, parameter in enumerate(part.trained()):
            key, (start, now) = keys[id(parameter)], kept[i]
            values = int((start.to(now.device, now.dtype) != now).sum())
            found.append(Movement(key, parameter, part, values > 0, values))
    return found


def _by_checksum(attachment: Attachment, part: Part, keys: dict[int, str]) -> list[Movement]:
    trained = [(keys[id(parameter)], parameter) for parameter in part.trained()]
    moved = [_changed(attachment.start.get(key), parameter) for key, parameter in trained]
    if part.restarts and any(each is not False for each in moved):
        moved = [each or None for each in moved]
    return [Movement(*named, part, each) for named, each in zip(trained, moved, strict=True)]


def _kept(part: Part) -> list[tuple[Tensor, Tensor]] | None:
    """What each trained tensor was, and what it is while the part is on; None where no copy is kept."""
    if isinstance(part, Entries):
        return [(part.start[0], part.values.detach())]
    if isinstance(part, Whole):
        return list(zip(part._start(), part.learned or part._read(), strict=True))
    return [] if isinstance(part, InPlace) else None


def _changed(recorded: tuple[str, int] | None, now: Tensor) -> bool | None:
    present = checksum(now)
    if recorded is None or present is None:
        return None
    if recorded[1] == 0:  # zeros are zeros in every dtype
        return bool(now.detach().any())
    return present != recorded if present[0] == recorded[0] else None
