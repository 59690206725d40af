"""Save what a method has learned, without the base model, and load it onto that base again.

A folder holds `adapter.safetensors`, which is the whole adapter (the description is in its header, so that one
rename replaces both at once), and `adapter.json`, the same description for people; nothing reads it. No pickle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from pefttutor.catalog import methods
from pefttutor.method import Method, adapted, described_base, merged, refuse_adapted, saved_tensors
from pefttutor.parts.fingerprint import check_base, describe_base
from pefttutor.saving.files import write_atomically

__all__ = ["load", "save"]

FORMAT = 1
TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"


def save(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write what the method attached to `model` has added and trained into `folder`, and return the folder.

    An interruption leaves what was there before. An adapter already in the folder is replaced.

    Raises: ValueError if no method is attached; RuntimeError if it is merged into the weights.
    """
    method = adapted(model)
    tensors = saved_tensors(model)
    if merged(model):
        raise RuntimeError(
            "this model is merged, so its base weights aren't the base's any more: "
            "save before method.merge(model), or call method.unmerge(model) first."
        )
    description = {
        "format": FORMAT,
        "method": type(method).__name__,
        "fields": dataclasses.asdict(method),  # type: ignore[call-overload]
        "base": described_base(model) or describe_base(model, without=tensors.keys()),
    }
    text = json.dumps(description, indent=1)
    whole = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    folder = Path(folder)
    write_atomically(folder / TENSORS, to_bytes(whole, metadata={"pefttutor": text}))
    write_atomically(folder / DESCRIPTION, text)
    return folder


def load(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Attach the method saved in `folder` to the base `model`, with what it had learned, and return the model.

    Raises: FileNotFoundError, or ValueError for a damaged or foreign file or another base than it was trained on;
        RuntimeError if the model is adapted already. The model is as it was then.
    """
    refuse_adapted(model)
    path = Path(folder) / TENSORS
    description, tensors = _read(path)
    method = _method(description, path)
    with _restored_on_error(model):
        names = dict(model.named_parameters())
        check_base(model, description["base"], without=[name for name in tensors if name in names])
        method.restore(model, tensors) if hasattr(method, "restore") else method.attach(model)
        into = saved_tensors(model)
        _check_tensors(into, tensors, path)
    for name, tensor in into.items():
        tensor.copy_(tensors[name])
    if hasattr(method, "loaded"):
        method.loaded(model)
    return model


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors in the file, which may be anything."""
    if not path.is_file():
        there = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else None
        found = "the folder doesn't exist" if there is None else f"the folder has {there or 'nothing'}"
        raise FileNotFoundError(f"{path} doesn't exist: {found}. pefttutor.save(model, folder) writes it.")
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
    except ValueError as error:
        raise ValueError(f"{path} is damaged: its description isn't JSON ({error}).") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{path} isn't of format {FORMAT}, the one this pefttutor reads: update pefttutor?")
    if not all(isinstance(description.get(key), dict) for key in ("fields", "base")):
        raise ValueError(f"{path} is damaged: its description lacks the method's fields or the base.")
    return description, tensors


def _method(description: dict[str, Any], path: Path) -> Method:
    """The method that the file names. A name only chooses among the package's own classes; it runs nothing."""
    name, known = description.get("method"), methods()
    if name not in known:
        raise ValueError(f"{path} is for the method {name!r}; this pefttutor has {', '.join(sorted(known))}.")
    try:
        return known[name](**description["fields"])
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{path} has a description that doesn't fit {name}: {error}") from error


def _check_tensors(expected: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is too much" for name in found if name not in expected]
    problems += [
        f"{name} has the shape {tuple(found[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{path} doesn't hold what its method needs: {'; '.join(problems[:3])}{more}.")


@contextlib.contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Take back everything that the block has changed in the structure of `model`, if it fails."""
    before = [
        (
            module,
            dict(vars(module)),
            {k: v.copy() for k, v in vars(module).items() if isinstance(v, (dict, set))},
        )
        for module in model.modules()
    ]
    trains = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    try:
        yield
    except BaseException:
        for module, attributes, tables in before:
            vars(module).clear()
            vars(module).update(attributes)
            for key, entries in tables.items():  # in place: hook handles refer to these very tables
                attributes[key].clear()
                attributes[key].update(entries)
        for parameter, (requires_grad, grad) in trains.items():
            parameter.requires_grad_(requires_grad).grad = grad
        raise
