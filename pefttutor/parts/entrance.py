"""Where a model's blocks begin: the first block of each stack, and how wide what goes into it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pefttutor.data.trial import trial
from pefttutor.parts.blocks import blocks
from pefttutor.parts.called import own_tokens
from pefttutor.parts.streams import hidden_states, token_table

__all__ = ["Entrance", "entrance"]


@dataclass(frozen=True)
class Entrance:
    """firsts: the first blocks by name. widths: of what goes into each. read: for each of the modules that were asked
    for, how wide what it was called with was, for every call; None without a trial."""

    firsts: Mapping[str, nn.Module]
    widths: Mapping[str, int]
    read: Sequence[list[int]] | None


def entrance(model: Any, what: str, also: Sequence[nn.Module] = ()) -> Entrance:
    """Where a text's tokens go into the blocks, as a trial has shown; without values, as is usual.

    what: begins a refusal: "X changes what goes in for a text's". also: modules that are watched in the same trial.

    Raises: ValueError for a model that reads no tokens, that can't be tried with some, or whose first block a text
        passes more than once.
    """
    table, kind = token_table(model, what), type(model).__name__
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    stacks = [model.get_encoder(), model.get_decoder()] if both else [model]
    names = {id(module): name for name, module in model.named_modules()}
    firsts = {names[id(block)]: block for block in (blocks(stack)[1][0] for stack in stacks)}
    tokens = own_tokens(model)
    if tokens is None:
        width = getattr(getattr(model, "config", None), "hidden_size", None) or table.shape[1]
        return Entrance(firsts, dict.fromkeys(firsts, int(width)), None)
    read = _read_by(model, [*firsts.values(), *also], tokens)
    for path, block in firsts.items():
        if len(read[block]) != 1:
            raise ValueError(
                f"{what} tokens once, and the first block of a {kind}, {path!r}, is called {len(read[block])} times "
                "for a text. Adapter changes the blocks themselves."
            )
    widths = {path: read[block][0] for path, block in firsts.items()}
    return Entrance(firsts, widths, [read[module] for module in also])


def _read_by(
    model: Any, modules: list[nn.Module], tokens: Mapping[str, Tensor]
) -> dict[nn.Module, list[int]]:
    """How wide what each of the modules is called with is, for every call in a trial."""
    widths: dict[nn.Module, list[int]] = {module: [] for module in modules}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        widths[module].append(hidden_states(args, kwargs).shape[-1])

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        with trial(model):
            model(**tokens)
    except Exception as error:  # whatever a model raises here means: it can't be tried in this way
        raise ValueError(
            f"a {type(model).__name__} can't be tried with three tokens alone ({type(error).__name__}: {error}), so it "
            "isn't known what goes into its blocks."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return widths
