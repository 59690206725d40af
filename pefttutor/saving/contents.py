"""What a file takes out of an attachment, and how tensors from a file come into one: all that fits, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from pefttutor.method import Attachment, find
from pefttutor.parts.restoring import restored_on_error

__all__ = ["check_tensors", "filled", "listed", "savable"]


def savable(model: nn.Module, name: str | None) -> Attachment:
    """The attachment called `name`, or the only one, as it may be written.

    Raises: ValueError if there is none, several and no name, or one that trains nothing; RuntimeError if it is merged
        into the weights, or switched off.
    """
    attachment = find(model, name)
    if attachment.merged:
        raise RuntimeError(
            "this model is merged, so its base weights aren't the base's any more: "
            "save before pefttutor.merge(model), or call pefttutor.unmerge(model) first."
        )
    if not attachment.active:
        raise RuntimeError(
            f"{attachment.name!r} is switched off, so the model holds other values: pefttutor.switch(model, "
            f"{attachment.name!r}) first."
        )
    if not attachment.tensors(model):
        raise ValueError(
            f"{attachment.name!r} ({type(attachment.method).__name__}) trains nothing, so there is nothing to save."
        )
    return attachment


def filled(
    model: nn.Module,
    name: str,
    attach: Callable[[], object],
    values: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
    path: Path,
) -> Attachment:
    """Attach, and let the new attachment hold the values that a file has for it.

    attach: attaches under `name`. values: of what was attached, all tensors by their names, the same from the file.

    Raises: ValueError unless the file has exactly what is needed. The model is then as it was.
    """
    with restored_on_error(model):
        attach()
        attachment = find(model, name)
        fresh = attachment.tensors(model)
        read = values(fresh)
        check_tensors(fresh, read, path)
    for key, tensor in fresh.items():
        tensor.copy_(read[key])
    for part in attachment.parts:
        part.loaded()
    return attachment


def check_tensors(expected: Mapping[str, Tensor], saved: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError unless the file has all tensors, none besides, of these shapes, and finite in these dtypes."""
    problems = [f"{name} is missing" for name in expected if name not in saved]
    problems += [f"{name} is too much" for name in saved if name not in expected]
    for name in [name for name in expected if name in saved]:
        needed, read = expected[name], saved[name]
        if needed.shape != read.shape:
            problems.append(f"{name} has the shape {tuple(read.shape)}, not {tuple(needed.shape)}")
        elif needed.is_floating_point() != read.is_floating_point():
            problems.append(f"{name} is of {read.dtype}, not of {needed.dtype}")
        elif needed.is_floating_point() and not read.to(needed.dtype).isfinite().all():
            problems.append(f"{name} holds NaN or infinity, or what is as good as that in {needed.dtype}")
    if problems:
        raise ValueError(f"{path} doesn't hold what its method needs: {listed(problems)}.")


def listed(problems: list[str]) -> str:
    """The first three, and how many more there are."""
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more
