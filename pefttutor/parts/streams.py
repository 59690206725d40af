"""What goes into a model and between its blocks: hooks on the body, so that every loss and every decoder sees them.

The body is what turns tokens into hidden states: `generate`, a loss that skips the head, and the model's own forward
all call it, with the token ids, the mask and the cache of this call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.parts.blocks import blocks
from pefttutor.parts.part import Part

__all__ = ["Hooked", "body", "hidden_size", "hidden_states", "seen_before"]

PreHook = Callable[[nn.Module, Any, Any], Any]  # (module, args, kwargs) → (args, kwargs) or None


def body(model: nn.Module) -> nn.Module:
    """The module that turns token ids into hidden states: `base_model` of transformers, else the model itself.

    >>> model = nn.Linear(2, 2)
    >>> body(model) is model
    True
    """
    inner = getattr(model, "base_model", None)
    return inner if isinstance(inner, nn.Module) else model


class Hooked(Part):
    """Hooks before some modules' forward; they hold no module themselves, so that a copied model is free."""

    def __init__(
        self, hooks: Iterable[tuple[nn.Module, PreHook]], after: Iterable[tuple[nn.Module, Any]] = ()
    ) -> None:
        self.hooks, self.after = list(hooks), list(after)
        self.switch(True)

    def trained(self) -> list[nn.Parameter]:
        return []

    def saved(self) -> list[tuple[str, Tensor]]:
        return []

    def switch(self, on: bool) -> None:
        for module, hook in self.hooks:
            present = [key for key, other in module._forward_pre_hooks.items() if other is hook]
            if on and not present:
                module.register_forward_pre_hook(hook, with_kwargs=True)
            for key in present if not on else ():
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for module, hook in self.after:
            present = [key for key, other in module._forward_hooks.items() if other is hook]
            if on and not present:
                module.register_forward_hook(hook)
            for key in present if not on else ():
                del module._forward_hooks[key]

    def remove(self) -> None:
        self.switch(False)


def seen_before(kwargs: dict[str, Any]) -> tuple[Any, int]:
    """The cache that a call goes on from, and how many tokens it holds; (None, 0) without one."""
    cache = kwargs.get("past_key_values", kwargs.get("cache"))
    measure = getattr(cache, "get_seq_length", None)
    return cache, int(measure()) if callable(measure) else 0


def hidden_states(args: Any, kwargs: Any, new: Tensor | None = None) -> Any:
    """What a block is called with as hidden states; with `new`, (args, kwargs) in which that stands in their place.

    Raises: ValueError where none of the arguments can be them.
    """
    if args and isinstance(args[0], Tensor):
        return args[0] if new is None else ((new, *args[1:]), kwargs)
    for key, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3:
            return value if new is None else (args, kwargs | {key: new})
    raise ValueError(
        f"a block was called with {sorted(kwargs)}; expected hidden states (batch, seq, d) first"
    )


def hidden_size(model: nn.Module) -> int:
    """The width of what goes into the blocks; not always that of the embeddings (ALBERT, ELECTRA).

    Raises: ValueError for a model whose blocks don't take (batch, seq, d).
    """
    table = model.get_input_embeddings()  # type: ignore[operator]
    width = int(getattr(getattr(model, "config", None), "hidden_size", 0) or table.weight.shape[1])
    if table.weight.is_meta:
        return width
    shapes: list[torch.Size] = []

    def note(block: nn.Module, args: Any, kwargs: Any) -> None:
        shapes.append(hidden_states(args, kwargs).shape)

    block, modes = blocks(model)[1][0], [(module, module.training) for module in model.modules()]
    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    try:
        model.eval()
        with torch.no_grad():
            body(model)(input_ids=torch.zeros(1, 2, dtype=torch.long, device=table.weight.device))
    finally:
        handle.remove()
        for module, mode in modes:
            module.training = mode
    if not shapes or tuple(shapes[0][:2]) != (1, 2):
        found = tuple(shapes[0]) if shapes else "not called"
        raise ValueError(
            f"the blocks of a {type(model).__name__} take (batch, seq, d) in other models; two tokens of one text are "
            f"{found} here, so it can't be said which token is which."
        )
    return shapes[0][2]
