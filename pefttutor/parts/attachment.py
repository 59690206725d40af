"""Attachments: which methods a model carries, under which names, and what each of them has put into it.

A model carries its attachments in a table of its own, `vars(model)["_pefttutor"]`, so that they are copied and pickled
with it. An attachment is a method, a name, and the parts that `attach` has made: chosen entries, a change of some
layers, parameters that train in place. A part knows how to switch itself off, fold itself in and take itself out.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.parts.checkpointing import open_to_checkpointing
from pefttutor.parts.fingerprint import checksum, describe_base
from pefttutor.parts.part import Part
from pefttutor.parts.restoring import restored_on_error
from pefttutor.parts.statistics import hold_statistics

__all__ = [
    "DEFAULT",
    "Attachment",
    "Attachments",
    "added_key",
    "attaching",
    "attachments",
    "base_of",
    "check_apart",
    "find",
    "share_a_weight",
]

DEFAULT = "default"  # the name of an attachment that was given none
_NAME = re.compile(r"[A-Za-z0-9_-]+")


def added_key(key: str, name: str) -> str:
    """What a tensor that an attachment adds is called in its layer; of the default attachment, as the papers call it.

    >>> added_key("lora_A", "default"), added_key("lora_A", "german")
    ('lora_A', 'lora_A@german')
    """
    return key if name == DEFAULT else f"{key}@{name}"


@dataclass(eq=False)
class Attachment:
    """One method on one model, under a name.

    parts: what was put in, in the order in which it acts. active: whether it takes effect. trains: whether it
    learns while it does. merged: whether it is folded into the weights at the moment. start: the checksums of the
    parameters that it has added, as they were when it was attached (`parts.movement`). reads: others that it computes
    with: they don't act by themselves while it does, and can't be taken out before it.
    """

    name: str
    method: Any
    parts: list[Part] = field(default_factory=list)
    active: bool = True
    trains: bool = True
    merged: bool = False
    start: dict[str, tuple[str, int] | None] = field(default_factory=dict)
    reads: tuple[str, ...] = ()

    def add(self, part: Part) -> None:
        """Take another part in."""
        self.parts.append(part)

    @property
    def learns(self) -> bool:
        return self.active and self.trains

    def switch(self, on: bool) -> None:
        """Let all its parts take effect, or none."""
        for part in self.parts if on else reversed(self.parts):
            part.switch(on)
        self.active = on

    def trained(self) -> list[nn.Parameter]:
        """What trains while this attachment does, each parameter once."""
        return list(dict.fromkeys(p for part in self.parts for p in part.trained()))

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What makes up this attachment, by the name it is saved under: in the model, without the attachment's own.

        Raises: ValueError if a layer that holds some of it isn't in the model any more.
        """
        names = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
        found = {}
        for key, tensor in (pair for part in self.parts for pair in part.saved()):
            if id(tensor) not in names:
                raise ValueError(f"this model has lost {key!r}: was a layer replaced after attaching?")
            name = names[id(tensor)]
            found[name if self.name == DEFAULT else name.removesuffix(f"@{self.name}")] = tensor.detach()
        return found


@dataclass(eq=False)
class Attachments:
    """All that a model carries.

    by_name: in the order of attaching. base: what the model was before the first (`describe_base`); None without
    values. trained: the names of the parameters that required a gradient then.
    """

    by_name: dict[str, Attachment]
    base: dict[str, Any] | None
    trained: frozenset[str]

    def learning(self) -> list[Attachment]:
        """The attachments that take effect and train."""
        return [attachment for attachment in self.by_name.values() if attachment.learns]

    def apply(self, model: nn.Module) -> None:
        """Let exactly that require a gradient which a learning attachment trains; drop all other gradients."""
        learning = self.learning()
        trains = {id(p) for attachment in learning for p in attachment.trained()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trains)
            if id(parameter) not in trains:
                parameter.grad = None
        learned = {id(t) for a in learning for part in a.parts for _, t in part.saved()}
        hold_statistics(model, learned if self.by_name else None)


def attachments(model: nn.Module) -> Attachments | None:
    """What `model` itself carries; None for a plain model. Raises: ValueError if only a part of it is adapted."""
    for name, module in model.named_modules():
        if "_pefttutor" in vars(module):
            if module is not model:
                raise ValueError(
                    f"a method is attached to the part {name!r} of this model: pass that part, or detach it there."
                )
            return vars(module)["_pefttutor"]
    return None


def find(model: nn.Module, name: str | None = None) -> Attachment:
    """The attachment called `name`; without a name, the only one.

    >>> from pefttutor import BitFit
    >>> find(BitFit().attach(nn.Linear(2, 2), name="small")).name
    'small'

    Raises: ValueError if there is none of that name, none at all, or several to choose from, with their names.
    """
    carried = attachments(model)
    if carried is None:
        raise ValueError("no method is attached to this model: call attach(model) of a method first.")
    there = ", ".join(f"{a.name!r} ({type(a.method).__name__})" for a in carried.by_name.values())
    if name is None and len(carried.by_name) > 1:
        raise ValueError(f"this model carries {there}: say which one by its name.")
    if name is not None and name not in carried.by_name:
        raise ValueError(f"nothing called {name!r} is attached to this model; it carries {there}.")
    return carried.by_name[name] if name is not None else next(iter(carried.by_name.values()))


@contextlib.contextmanager
def attaching(model: nn.Module, method: Any, name: str = DEFAULT) -> Iterator[Attachment]:
    """What every `attach` does around its own work: the block gets an empty attachment and adds its parts to it.

    When the block is done, all is frozen but for what the attachments that learn train. When it fails, the model is
    as it was. What is made within torch.inference_mode could never be trained, so it is left for the block.

    Raises: ValueError for a name that is taken or can't be one, or if nothing would train.
    """
    before = attachments(model)
    _check_name(before, name)
    with torch.inference_mode(False), restored_on_error(model):
        carried = before or Attachments(
            {},
            None if any(p.is_meta for p in model.parameters()) else describe_base(model, without=()),
            frozenset(n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad),
        )
        new = Attachment(name, method)
        yield new
        if not any(part.saved() or part.acts_alone for part in new.parts):
            raise ValueError(f"{type(method).__name__}: nothing is chosen, so nothing would train.")
        check_apart(carried, new)
        added = [pair for part in new.parts if not part.changed_in_place() for pair in part.saved()]
        new.start = {key: checksum(tensor) for key, tensor in added}
        for other in [a for a in carried.by_name.values() if a.active and a.name in new.reads]:
            other.switch(False)
        vars(model)["_pefttutor"] = Attachments({**carried.by_name, name: new}, carried.base, carried.trained)
        vars(model)["_pefttutor"].apply(model)
        open_to_checkpointing(model)


def _check_name(before: Attachments | None, name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"name is {name!r}; expected letters, digits, _ and -, such as 'german'.")
    if before and name in before.by_name:
        there = ", ".join(f"{other.name!r} ({other.method})" for other in before.by_name.values())
        raise ValueError(
            f"this model is already adapted: it carries {there}. Give another name, attach(model, name=…), or take "
            f"that one out: pefttutor.detach(model, {name!r})."
        )


def base_of(model: nn.Module, without: Collection[str]) -> dict[str, Any]:
    """`describe_base` of what the attachments stand on: as it is now, or as it was where they have changed it.

    without: names of parameters that aren't to be described, such as a head that is trained and saved.
    """
    carried = attachments(model)
    changed: set[int] = set()
    for attachment in carried.by_name.values() if carried else ():
        for part in attachment.parts:
            written = part.touched() if attachment.merged else part.changed_in_place()
            changed |= {id(t) for t in (*written, *part.added())}
    named = {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    now = describe_base(model, without=[name for name, key in named.items() if key in changed])
    before = (carried.base or {}) if carried else {}
    kept = {name: before[name] for name, key in named.items() if key in changed and name in before}
    return {name: values for name, values in (kept | now).items() if name not in without}


def share_a_weight(one: Attachment, other: Attachment, *, besides: type | None = None) -> bool:
    """Whether a tensor of the base belongs to a part of each, and the two parts aren't simply added.

    besides: two parts of this type don't count.
    """
    return any(
        {id(t) for t in mine.touched()} & {id(t) for t in theirs.touched()}
        and not (mine.additive and theirs.additive)
        and not (besides and isinstance(mine, besides) and isinstance(theirs, besides))
        for mine in one.parts
        for theirs in other.parts
    )


def check_apart(carried: Attachments, new: Attachment, *, switched: bool = False) -> None:
    """Raise ValueError if `new` and another active attachment would both change the same tensor in place.

    switched: both are about to be switched on, whatever they are now.
    """
    for other in carried.by_name.values():
        if not (other.active or switched):
            continue
        if other.merged and share_a_weight(new, other):
            raise ValueError(
                f"{other.name!r} ({type(other.method).__name__}) is merged into a weight that {new.name!r} "
                f"({type(new.method).__name__}) builds on: pefttutor.unmerge(model) first."
            )
        theirs = {id(t) for part in other.parts for t in part.changed_in_place()}
        shared = [key for part in new.parts for key, t in part.named_in_place() if id(t) in theirs]
        if shared:
            raise ValueError(
                f"{other.name!r} ({type(other.method).__name__}) and {new.name!r} ({type(new.method).__name__}) would "
                f"both change {shared[0]!r} in place ({len(shared)} such tensors). Switch that one off first: "
                "pefttutor.switch(model)."
            )
