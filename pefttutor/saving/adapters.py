"""Save what a method has learned, without the base model, and load it onto that base again.

A folder holds `adapter.safetensors`, which is the whole adapter (the description is in its header, so that one
rename replaces both at once), and `adapter.json`, the same description for people; nothing reads it. No pickle.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from pefttutor.catalog import methods
from pefttutor.method import DEFAULT, Attachment, Method, find
from pefttutor.parts.attachment import base_of
from pefttutor.parts.entries import saved_choice, train_entries
from pefttutor.parts.fingerprint import check_base, describe_base, problems
from pefttutor.parts.modules import find_modules
from pefttutor.saving.contents import filled, savable
from pefttutor.saving.files import write_atomically

__all__ = ["description", "load", "save"]

FORMAT = 1
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"


def save(model: nn.Module, folder: str | os.PathLike[str], *, name: str | None = None) -> Path:
    """Write what the attachment called `name`, or the only one, has added and trained into `folder`; return the folder.

    An interruption leaves what was there before. An adapter already in the folder is replaced.

    >>> from tempfile import TemporaryDirectory; from pefttutor.lowrank import LoRA
    >>> model = LoRA(r=2, target_modules=("0",)).attach(nn.Sequential(nn.Linear(6, 4)))
    >>> with TemporaryDirectory() as folder:
    ...     sorted(path.name for path in save(model, folder).iterdir())
    ['adapter.json', 'adapter.safetensors']

    Raises: ValueError if there is no such attachment, several and no name, or one that trains nothing; RuntimeError if
        it is merged into the weights, or switched off.
    """
    attachment = savable(model, name)
    tensors = attachment.tensors(model)
    text = json.dumps(description(model, attachment.name), indent=1)
    on_cpu = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    folder = Path(folder)
    write_atomically(folder / TENSORS, to_bytes(on_cpu, metadata={"pefttutor": text}))
    write_atomically(folder / DESCRIPTION, text)
    return folder


def description(model: nn.Module, name: str | None = None) -> dict[str, Any]:
    """What an attachment is, and on which base it stands: all that a file says beside the tensors.

    >>> from pefttutor.lowrank import LoRA
    >>> about = description(LoRA(r=2, target_modules=("0",)).attach(nn.Sequential(nn.Linear(6, 4))))
    >>> about["method"], about["fields"]["r"], list(about["base"])
    ('LoRA', 2, ['0.weight', '0.bias'])

    Raises: ValueError if there is no such attachment, or several and no name.
    """
    attachment = find(model, name)
    about = {
        "format": FORMAT,
        "method": type(attachment.method).__name__,
        "fields": _fields(model, attachment.method),
        "base": base_of(model, without=attachment.tensors(model)),
    }
    return about | ({"reads": _others(model, attachment)} if attachment.reads else {})


def _others(model: nn.Module, attachment: Attachment) -> dict[str, Any]:
    """What the attachments hold that this one computes with, described as a base is."""
    parts = [part for name in attachment.reads for part in find(model, name).parts]
    held = {id(tensor) for part in parts for tensor in part.added()}
    named = (*model.named_parameters(), *model.named_buffers())
    return describe_base(model, without=[name for name, tensor in named if id(tensor) not in held])


def _fields(model: nn.Module, method: Any) -> dict[str, Any]:
    """A method's fields, with names in the place of patterns that `load` couldn't find in the tensors' names."""
    fields = dataclasses.asdict(method)
    for name, value in fields.items():
        if name.endswith("_modules") and name != "target_modules" and isinstance(value, str):
            fields[name] = tuple(find_modules(model, value, field=name))
    return fields


def load(model: nn.Module, folder: str | os.PathLike[str], *, name: str = DEFAULT) -> nn.Module:
    """Attach the method saved in `folder` to the base `model`, with what it had learned, and return the model.

    name: what the attachment is called in this model, whatever it was called where it was saved.

    >>> from copy import deepcopy; from tempfile import TemporaryDirectory; from pefttutor.lowrank import LoRA
    >>> base = nn.Sequential(nn.Linear(6, 4))
    >>> model = LoRA(r=2, target_modules=("0",)).attach(deepcopy(base))
    >>> with TemporaryDirectory() as folder:
    ...     load(base, save(model, folder))[0].lora_A.equal(model[0].lora_A)
    True

    Raises: FileNotFoundError if there is no such file; ValueError for a damaged or foreign file, another base than it
        was trained on, or a name in use. The model is then as it was.
    """
    path = Path(folder) / TENSORS
    about, tensors = _read(path)
    _check_twin(path, about)
    method = _method(about, path)
    check_base(base_of(model, without=tensors), about["base"])
    resolved = _resolved(method, tensors, model)

    def attach() -> None:
        _attach(model, resolved, tensors, name)
        _check_read(model, find(model, name), about, path)

    attachment = filled(model, name, attach, lambda fresh: tensors, path)
    attachment.method = method
    return model


def _check_read(model: nn.Module, attachment: Attachment, about: dict[str, Any], path: Path) -> None:
    """Raise ValueError if the attachment computes with others than it was trained with."""
    if others := problems(_others(model, attachment), about.get("reads", {})):
        raise ValueError(
            f"{path} holds what computes with {attachment.reads}, and these were others: here {others[0]}. Load "
            "first, under these names, the adapters that it was trained with."
        )


def _attach(model: nn.Module, method: Any, tensors: dict[str, Tensor], name: str) -> None:
    """Attach the method; one that has chosen entries gets those that were chosen."""
    chosen = saved_choice(tensors)
    if hasattr(method, "restore"):  # it has chosen among what it adds
        method.restore(model, tensors, name=name)
    elif chosen:
        train_entries(model, method, chosen, method.modules_to_save, name=name)
    else:
        method.attach(model, name=name)


def _resolved(method: Any, tensors: dict[str, Tensor], model: nn.Module) -> Any:
    """The method with the whole names of its modules in the place of a pattern: a file's pattern is never run.

    A regular expression can be made to run for hours. Which layers it meant is known from the tensors.
    """
    for field in dataclasses.fields(method):
        pattern = getattr(method, field.name)
        if field.name.endswith("_modules") and field.name != "target_modules" and isinstance(pattern, str):
            raise ValueError(f"{field.name} is the pattern {pattern!r}; from a file only names are taken.")
    targets = getattr(method, "target_modules", None)
    if not isinstance(targets, str):
        return method
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    names = dict.fromkeys(key.rpartition(".")[0] for key in tensors if key not in own)
    return dataclasses.replace(method, target_modules="|".join(map(re.escape, names)))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors in the file, which may be anything."""
    if not path.is_file():
        files = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else None
        folder = "the folder doesn't exist" if files is None else f"the folder has {files or 'nothing'}"
        raise FileNotFoundError(f"{path} doesn't exist: {folder}. pefttutor.save(model, folder) writes it.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}). Save it again.") from error
    if "pefttutor" not in metadata:
        raise ValueError(f"{path} wasn't written by pefttutor.save: its header has no 'pefttutor' entry.")
    try:
        description = json.loads(metadata["pefttutor"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its description isn't JSON ({error}).") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{path} isn't of format {FORMAT}, the one this pefttutor reads: update pefttutor?")
    needed = [description.get("fields"), description.get("base"), description.get("reads", {})]
    if not all(isinstance(each, dict) for each in needed):
        raise ValueError(f"{path} is damaged: its description lacks the method's fields or the base.")
    return description, tensors


def _method(description: dict[str, Any], path: Path) -> Method:
    """The method that the file names. A name only chooses among the package's own classes; it runs nothing."""
    name, known = description.get("method"), methods()
    if name not in known:
        raise ValueError(f"{path} is for the method {name!r}; this pefttutor has {', '.join(sorted(known))}.")
    try:
        return known[name](**description["fields"])
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise ValueError(f"{path} has a description that doesn't fit {name}: {error}") from error


def _check_twin(path: Path, description: dict[str, Any]) -> None:
    """Say so if the description for people isn't the one that counts: somebody may have edited it, in vain."""
    twin = path.with_name(DESCRIPTION)
    try:
        same = not twin.is_file() or json.loads(twin.read_text(encoding="utf-8")) == description
    except (ValueError, OSError, RecursionError):
        same = False
    if not same:
        warnings.warn(
            f"{twin} says something else than the header of {TENSORS}, which alone is read: was it edited? Save the "
            "adapter again to make them agree.",
            stacklevel=3,
        )
