"""What goes into a model and between its blocks: hooks on the body, so that every loss and every decoder sees them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.data.trial import ordinary, trial
from pefttutor.parts.attachment import attachments
from pefttutor.parts.blocks import blocks
from pefttutor.parts.part import Part

__all__ = [
    "MADE_FOR_A_CACHE",
    "Hooked",
    "cache_made",
    "hidden_states",
    "hooked_by",
    "longer_by",
    "named_arguments",
    "reader",
    "said_by",
    "said_instead",
    "seen_before",
    "token_ids",
    "token_table",
]

CACHES = ("past_key_values", "cache_params", "cache")  # what models call it
# Why generate hands a mask that isn't (batch, seq), for whoever has to refuse it.
MADE_FOR_A_CACHE = (
    "One that generate has made for a cache of fixed length is not: leave cache_implementation out."
)

PreHook = Callable[[nn.Module, Any, Any], Any]  # (module, args, kwargs) → (args, kwargs) or None


class Hooked(Part):
    """Hooks on some modules' forward; they hold no module themselves, so that a copied model is free.

    In a module the hooks of a lower `rank` come first, those of one rank in the order of attaching. What is done after
    the forward, and what before it takes back what others have changed, comes the other way round.
    """

    def __init__(
        self,
        hooks: Iterable[tuple[nn.Module, PreHook]],
        after: Iterable[tuple[nn.Module, Any]] = (),
        taking_back: Iterable[tuple[nn.Module, PreHook]] = (),
    ) -> None:
        self.hooks, self.after, self.taking_back = list(hooks), list(after), list(taking_back)
        self.switch(True)

    def trained(self) -> list[nn.Parameter]:
        return []

    def saved(self) -> list[tuple[str, Tensor]]:
        return []

    def switch(self, on: bool) -> None:
        for hooks, last_first in ((self.hooks, False), (self.taking_back, True)):
            for module, hook in hooks:
                before: Any = module._forward_pre_hooks
                for key in [key for key, other in before.items() if other is hook]:
                    del before[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
                if on:
                    module.register_forward_pre_hook(hook, with_kwargs=True, prepend=last_first)
                    _let_pass(before, hook, last_first=last_first)
        for module, hook in self.after:
            after: Any = module._forward_hooks
            for key in [key for key, other in after.items() if other is hook]:
                del after[key]
            if on:
                module.register_forward_hook(hook, prepend=True)  # the last to come in is the first to go out
                _let_pass(after, hook, last_first=True)

    def in_turn(self) -> None:
        self.switch(True)

    def remove(self) -> None:
        self.switch(False)


def _let_pass(hooks: Any, hook: Any, *, last_first: bool) -> None:
    """Move those of a higher rank than this hook's to the end, or where the last one goes first to the beginning."""
    higher = [key for key, other in hooks.items() if _rank(other) > _rank(hook) >= 0]
    for key in reversed(higher) if last_first else higher:
        hooks.move_to_end(key, last=not last_first)


def _rank(hook: Any) -> int:
    """As its owner says: 0 makes a text longer, 1 looks at all its tokens, 2 hides its cache. −1: a foreign hook, which
    stays where it is."""
    return getattr(getattr(hook, "__self__", None), "rank", -1)


def hooked_by(module: nn.Module) -> list[Any]:
    """Whose methods the hooks before a module's forward are; None stands for a plain function."""
    return [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]


def named_arguments(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by their names."""
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs


def seen_before(kwargs: dict[str, Any]) -> tuple[Any, bool | None]:
    """The cache that a call goes on from, and whether it holds tokens already: None where it doesn't count them.

    (None, False) without a cache.
    """
    cache = next((kwargs[key] for key in CACHES if kwargs.get(key) is not None), None)
    try:
        return cache, cache is not None and int(cache.get_seq_length()) > 0
    except (AttributeError, ValueError):  # a state-space model's
        return cache, None


def cache_made(output: Any) -> Any:
    """The cache that a call has made or gone on from, or None."""
    if isinstance(output, tuple):
        return next((x for x in output if hasattr(x, "get_seq_length")), None)
    # Its newest name first: transformers 5.24 warns of those of before, which it still answers to.
    found = (getattr(output, key, None) for key in reversed(CACHES))
    return next((cache for cache in found if hasattr(cache, "__dict__")), None)


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


def said_by(output: Any) -> Tensor | None:
    """The first tensor of what a module gives, its hidden states."""
    values = output if isinstance(output, (tuple, list)) else (output,)
    values = tuple(output.values()) if isinstance(output, dict) else values
    return next((value for value in values if isinstance(value, Tensor)), None)


def said_instead(output: Any, new: Tensor) -> Any:
    """What a module gives, in which `new` stands for its hidden states, in their dtype.

    >>> said_instead((None, torch.ones(1)), torch.zeros(1))
    (None, tensor([0.]))
    """
    if isinstance(output, Tensor):
        return new.to(output.dtype)
    if isinstance(output, (tuple, list)):
        at = next(i for i, value in enumerate(output) if isinstance(value, Tensor))
        return type(output)([*output[:at], said_instead(output[at], new), *output[at + 1 :]])
    key = next(key for key, value in output.items() if isinstance(value, Tensor))
    output[key] = said_instead(output[key], new)
    return output


def reader(model: nn.Module) -> tuple[nn.Module, int]:
    """The innermost module around the blocks that gets token ids, and the width of what goes into the blocks.

    `generate`, a loss that skips the head and the model's own forward all call that module, with the mask and the
    cache of the call. Both are seen in a trial; without values, they are taken from what is usual.

    Raises: ValueError for a model whose blocks don't take (batch, seq, d), or that can't be tried with tokens alone.
    """
    path, stack = blocks(model)
    table = model.get_input_embeddings()  # type: ignore[operator]
    if table.weight.is_meta:
        width = getattr(getattr(model, "config", None), "hidden_size", None) or table.weight.shape[1]
        return getattr(model, "base_model", model), int(width)
    around = [model.get_submodule(path[:i].rstrip(".")) for i in _ends(path)]
    readers: list[nn.Module] = []
    shapes: list[torch.Size] = []

    def read(module: nn.Module, args: Any, kwargs: Any) -> None:
        if token_ids(args, kwargs) is not None:
            readers.append(module)

    def note(block: nn.Module, args: Any, kwargs: Any) -> None:
        shapes.append(hidden_states(args, kwargs).shape)

    handles = [module.register_forward_pre_hook(read, with_kwargs=True) for module in around]
    handles.append(stack[0].register_forward_pre_hook(note, with_kwargs=True))
    try:
        with trial(model):
            model(input_ids=torch.tensor([ordinary(model, len(table.weight), 2)], device=table.weight.device))
    except Exception as error:
        raise ValueError(
            f"a {type(model).__name__} can't be tried with two tokens alone ({type(error).__name__}: {error}), so it "
            "isn't known where its tokens go in."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not readers or not shapes or tuple(shapes[0][:2]) != (1, 2 + longer_by(model)):
        found = tuple(shapes[0]) if shapes else "not called"
        raise ValueError(
            f"the blocks of other models take (batch, seq, d); those of a {type(model).__name__} get two tokens of one "
            f"text as {found}, so it can't be said which token is which."
        )
    return readers[-1], shapes[0][2]


def longer_by(model: nn.Module) -> int:
    """How many virtual tokens the model reads before each text at the moment."""
    carried = attachments(model)
    return sum(part.lengthens() for a in (carried.by_name.values() if carried else ()) for part in a.parts)


def token_table(model: nn.Module, what: str) -> Tensor:
    """The token embeddings of a model that reads a text. `what` begins the refusal of one that doesn't.

    Shapes: → (vocabulary, d). Raises: ValueError for a model that reads no tokens, or doesn't tell of their embeddings.
    """
    kind, reads = type(model).__name__, getattr(model, "main_input_name", "input_ids")
    if reads != "input_ids":
        raise ValueError(f"{what} tokens, and a {kind} has none: it reads {reads}.")
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        table = None
    if not isinstance(table, nn.Embedding):
        raise ValueError(
            f"{what} tokens, and a {kind} has none that it tells of: its get_input_embeddings() gives "
            f"{'nothing' if table is None else 'a ' + type(table).__name__}, not an nn.Embedding."
        )
    return table.weight


def token_ids(args: Any, kwargs: Any) -> Tensor | None:
    """The token ids that a module is called with, or None."""
    ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else next(iter(args), None)
    return ids if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dim() == 2 else None


def _ends(path: str) -> list[int]:
    """Where the names of the modules around a path end: nothing, "model", "model.decoder", …"""
    return [0, *(i for i, letter in enumerate(path) if letter == ".")]
