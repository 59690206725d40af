"""Leave a model as it was, if what is being done with it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["restored_on_error"]


@contextlib.contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Take back everything that the block has changed in the structure of `model`, if it fails."""
    before = [
        (module, type(module), dict(vars(module)), _copied_tables(module)) for module in model.modules()
    ]
    carried = vars(model).get("_pefttutor")
    active = [(a, a.active) for a in carried.by_name.values()] if carried else []
    trains = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    try:
        yield
    except BaseException:
        for module, kind, attributes, tables in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for key, entries in tables.items():  # in place: hook handles refer to these very tables
                attributes[key].clear()
                attributes[key].update(entries)
        for attachment in [a for a, was in active if a.active != was]:  # a new one may have switched it off
            attachment.switch(not attachment.active)
        for parameter, (requires_grad, grad) in trains.items():
            parameter.requires_grad_(requires_grad).grad = grad
        raise


def _copied_tables(module: nn.Module) -> dict[str, Any]:
    return {key: value.copy() for key, value in vars(module).items() if isinstance(value, (dict, set))}
