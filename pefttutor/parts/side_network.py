"""Small networks beside a model: blocks of its own kind, r times as narrow, without values of their own.

A narrower block is made by the model's own class, from a config whose widths are divided by r. What it starts from is
the model's block, of which every r-th feature is kept: of the residual stream, inside each head, and in the
feed-forward. So both matrices at a place keep the same features, a head stays a head, and a rotation turns the kept
pairs by the angles that they had.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.data.trial import trial
from pefttutor.parts.blocks import blocks
from pefttutor.parts.norms import is_norm
from pefttutor.parts.streams import hidden_states, said_by
from pefttutor.parts.sublayers import trial_inputs

__all__ = ["Side", "Stack", "narrower", "stack_of", "thinned"]

# What configs call the width of the residual stream, of a head, and of a feed-forward.
STREAM = ("hidden_size", "d_model", "n_embd", "dim")
HEAD = ("head_dim", "rotary_dim")
WITHIN = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "hidden_dim", "word_embed_proj_dim")


@dataclass(frozen=True)
class Stack:
    """A model's blocks, as a trial has shown them. path: of their list. around: the module that calls them.

    after: what it calls after them, norms as a rule. width: of the residual stream. config: what they were made from.
    """

    path: str
    around: nn.Module
    blocks: nn.ModuleList
    after: tuple[str, ...]
    width: int
    config: Any


class Side(nn.Module):
    """Narrower blocks in their order, and what comes after them: s ← block(g · s + (1 − g) · x), for each x and g."""

    def __init__(self, blocks: Sequence[nn.Module], after: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks, self.after = nn.ModuleList(blocks), nn.ModuleList(after)

    def forward(
        self, s: Tensor, read: list[Tensor], gates: list[Tensor], calls: list[dict[str, Any]]
    ) -> Tensor:
        """`calls`: what each block is called with beside the hidden states. Shapes: (batch, seq, d/r) → the same."""
        for block, x, gate, call in zip(self.blocks, read, gates, calls, strict=True):
            s = block(gate * s + (1 - gate) * x, **call)
            s = s[0] if isinstance(s, tuple) else s
        for module in self.after:
            s = module(s)
        return s


def stack_of(model: Any) -> Stack:
    """The model's blocks, seen in a trial to be called one after the other, each with what the last one gave.

    Cost: a forward pass of three tokens, or of one picture.
    Raises: ValueError for a model that isn't such a stack, or can't be tried.
    """
    path, stack = blocks(model)
    around = model.get_submodule(path.rpartition(".")[0])
    config = getattr(model, "config", None)
    if config is None or config.is_encoder_decoder:
        reason = "it has no config" if config is None else "it has an encoder and a decoder"
        raise ValueError(_no_stack(model, reason))
    order: list[_Called] = []
    said: list[Tensor | None] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hidden = hidden_states(args, kwargs) if any(module is block for block in stack) else None
        order.append(_Called(module, hidden, {id(x) for x in (*args, *kwargs.values())}, output))

    handles = [
        m.register_forward_hook(note, with_kwargs=True)
        for m in (*stack, *around.children())
        if m is not stack
    ]
    handles.append(
        around.register_forward_hook(lambda module, args, output: said.append(said_by(output)), prepend=True)
    )
    try:
        with trial(model):
            model(**trial_inputs(model))
    except Exception as error:  # whatever a model raises here means: it can't be tried in this way
        raise ValueError(_no_stack(model, f"it can't be tried ({type(error).__name__}: {error})")) from error
    finally:
        for handle in handles:
            handle.remove()
    ends = [i for i, call in enumerate(order) if call.module is stack[-1]]
    after = [call.module for call in order[ends[-1] + 1 :]] if ends else []
    run = [call for call in order if call.hidden is not None]
    last = said_by(order[-1].output) if order else None
    if why := _why_not(stack, run, after, last, said):
        raise ValueError(_no_stack(model, why))
    names = {id(m): name for name, m in around.named_children()}
    width = run[0].hidden.shape[-1]  # type: ignore[union-attr]
    return Stack(
        path, around, stack, tuple(names[id(m)] for m in after), width, getattr(around, "config", config)
    )


def _no_stack(model: nn.Module, reason: str) -> str:
    return (
        f"a side network is built beside one stack of blocks, and of this {type(model).__name__} that isn't possible: "
        f"{reason}. Adapter and LoRA change the blocks themselves."
    )


@dataclass
class _Called:
    """A module's call. hidden: the hidden states that a block got. given: the ids of all that the module got."""

    module: nn.Module
    hidden: Tensor | None
    given: set[int]
    output: Any


def _why_not(
    stack: nn.ModuleList, run: list[_Called], after: list[nn.Module], last: Tensor | None, said: list[Any]
) -> str | None:
    """What keeps the calls of a trial from being one stack with norms after it, or None."""
    if [call.module for call in run] != list(stack):
        return "its blocks aren't called once each, one after the other"
    shapes = {tuple(call.hidden.shape) for call in run if call.hidden is not None}
    if len(shapes) > 1 or len(next(iter(shapes))) != 3 or next(iter(shapes))[0] != 1:
        return f"its blocks get hidden states of the shapes {sorted(shapes)}, not (batch, seq, d)"
    for one, following in itertools.pairwise(run):
        more = one.output[1:] if isinstance(one.output, tuple) else ()
        if any(isinstance(x, Tensor) and id(x) in following.given for x in more):
            return "its blocks hand on more than hidden states"
    others = [m for m in after if not is_norm(m) and any(True for _ in m.parameters())]
    if others:
        return f"a {type(others[0]).__name__} reads what the blocks give, before anybody outside of them does"
    if last is None or len(said) != 1 or said[0] is None or said[0].shape != last.shape:
        return "what the blocks give isn't what the module around them gives"
    return None


# ---- narrower blocks


def narrower(found: Stack, reduction: int, kept: Sequence[int], seed: int) -> tuple[Side, Any]:
    """Blocks as those of these indices, with what comes after them, r times as narrow, and the config of these.

    They have the values that their class draws from `seed`. No generator outside is changed.

    Raises: ValueError for widths that r doesn't divide, or a class that can't be made from such a config.
    """
    kind = type(found.around).__name__
    small = _divided(found, reduction, kept)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            made: Any = type(found.around)(small)
    except Exception as error:  # whatever its class raises here means: it can't be made narrower in this way
        raise ValueError(
            f"no {kind} can be made with widths divided by {reduction} ({type(error).__name__}: {error}); give another "
            "reduction, or take Adapter or LoRA."
        ) from error
    side = Side(
        made.get_submodule(found.path.rpartition(".")[2]), [getattr(made, name) for name in found.after]
    )
    if len(side.blocks) != len(kept):
        raise ValueError(f"a {kind} of {len(kept)} blocks has {len(side.blocks)}; give layers=None, for all.")
    for name, p, own in _pairs(found, side, kept):
        if p.dim() != own.dim() or any(
            n not in (m, m // reduction) for n, m in zip(p.shape, own.shape, strict=True)
        ):
            raise ValueError(
                f"{name!r} is {tuple(own.shape)} in this {kind} and {tuple(p.shape)} in one with widths divided by "
                f"{reduction}: expected each size, or that of it. Take Adapter or LoRA."
            )
    return side, small


def _divided(found: Stack, reduction: int, kept: Sequence[int]) -> Any:
    """The config with its widths divided, and as many layers as are kept."""
    small = copy.deepcopy(found.config)
    widths = {
        name: value
        for name, value in vars(small).items()
        if isinstance(value, int) and not isinstance(value, bool)
    }
    heads = getattr(small, "num_attention_heads", 1)
    head = widths.get("head_dim") or found.width // heads
    for what, size in (("the hidden states", found.width), ("a head", head)):
        if size % reduction or size == reduction:
            raise ValueError(
                f"reduction is {reduction}; it must divide the width of {what}, {size}, and leave at least 2 features."
            )
    depth = len(found.blocks)
    for name in (*STREAM, *HEAD, *WITHIN):
        if name in widths:
            setattr(small, name, max(1, widths[name] // reduction))
    for name, value in list(vars(small).items()):
        if isinstance(value, (list, tuple)) and len(value) == depth and name.endswith(("layers", "types")):
            setattr(small, name, type(value)(value[i] for i in kept))
    small.num_hidden_layers = len(kept)
    if "vocab_size" in widths:  # nobody asks for its embeddings
        small.vocab_size = 1 + max(getattr(small, "pad_token_id", None) or 0, 0)
    return small


def _pairs(found: Stack, side: Side, kept: Sequence[int]) -> list[tuple[str, Tensor, Tensor]]:
    """Each parameter of the side network by its name there, and the model's own of which it is the narrower one."""
    pairs: list[tuple[str, Tensor, Tensor]] = []
    for name, p in side.named_parameters():
        room, index, key = name.split(".", 2)
        own: nn.Module = found.blocks[kept[int(index)]]
        own = own if room == "blocks" else found.around.get_submodule(found.after[int(index)])
        try:
            pairs.append((name, p, own.get_parameter(key)))
        except AttributeError as error:
            raise ValueError(
                f"the block of the model has no parameter {key!r} any more, of which the side network's would be the "
                "narrower one. Attach before what changes its layers, or to a model that isn't quantised."
            ) from error
    return pairs


@torch.no_grad()
def thinned(found: Stack, side: Side, kept: Sequence[int]) -> dict[str, Tensor]:
    """The model's own values, of which every r-th feature is kept, by the names of the side network's parameters."""
    values = {}
    for name, p, own in _pairs(found, side, kept):
        for axis, size in enumerate(p.shape):
            step = own.shape[axis] // size
            places = torch.arange(0, step * size, step, device=own.device)
            own = own.index_select(axis, places)
        values[name] = own.detach().clone()
    return values
