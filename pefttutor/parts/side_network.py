"""Small networks beside a model: blocks of its own kind, r times as narrow, without values of their own.

A narrower block is made by the model's own class, from a config whose widths are divided by r. What it starts from is
the model's block, of which every r-th feature is kept: of the residual stream, inside each head, and in the
feed-forward. So both matrices at a place keep the same features, a head stays a head, and a rotation turns the kept
pairs by the angles that they had.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.data.trial import trial
from pefttutor.parts.blocks import blocks
from pefttutor.parts.norms import is_norm
from pefttutor.parts.streams import hidden_states
from pefttutor.parts.sublayers import trial_inputs

__all__ = ["Side", "Stack", "narrower", "stack_of", "thinned"]

# What configs call the width of the residual stream, of a head, and of a feed-forward.
STREAM = ("hidden_size", "d_model", "n_embd", "dim")
HEAD = ("head_dim", "rotary_dim")
WITHIN = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "hidden_dim", "word_embed_proj_dim")


@dataclass(frozen=True)
class Stack:
    """A model's blocks, as a trial has shown them. path: of their list. around: the module that calls them.

    norms: what it calls after them. width: of the residual stream. config: what the blocks were made from.
    """

    path: str
    around: nn.Module
    blocks: nn.ModuleList
    norms: tuple[str, ...]
    width: int
    config: Any


class Side(nn.Module):
    """Narrower blocks in their order, and the norms after them: s ← block(g · s + (1 − g) · x), for each x and g."""

    def __init__(self, blocks: Sequence[nn.Module], norms: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks, self.norms = nn.ModuleList(blocks), nn.ModuleList(norms)

    def forward(self, s: Tensor, read: list[Tensor], gates: list[Tensor], calls: list[dict[str, Any]]) -> Tensor:
        """`calls`: what each block is called with beside the hidden states. Shapes: (batch, seq, d/r) → the same."""
        for block, x, gate, call in zip(self.blocks, read, gates, calls, strict=True):
            s = block(gate * s + (1 - gate) * x, **call)
            s = s[0] if isinstance(s, tuple) else s
        for norm in self.norms:
            s = norm(s)
        return s


def stack_of(model: Any) -> Stack:
    """The model's blocks, seen in a trial to be called one after the other, each with what the last one gave.

    Cost: a forward pass of three tokens, or of one picture.
    Raises: ValueError for a model that isn't such a stack, or can't be tried.
    """
    path, stack = blocks(model)
    around = model.get_submodule(path.rpartition(".")[0])
    if getattr(getattr(model, "config", None), "is_encoder_decoder", True):
        raise ValueError(_no_stack(model, "it has an encoder and a decoder, or no config"))
    names = {id(m): name for name, m in around.named_children()}
    order: list[tuple[nn.Module, Any, Any]] = []
    said: list[Tensor | None] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        order.append((module, hidden_states(args, kwargs) if module in set(stack) else None, output))

    called = [*stack, *(m for m in around.children() if m is not stack and any(True for _ in m.parameters()))]
    handles = [module.register_forward_hook(note, with_kwargs=True) for module in called]
    handles.append(around.register_forward_hook(lambda module, args, output: said.append(first(output))))
    try:
        with trial(model):
            model(**trial_inputs(model))
    except Exception as error:  # whatever a model raises here means: it can't be tried in this way
        raise ValueError(_no_stack(model, f"it can't be tried ({type(error).__name__}: {error})")) from error
    finally:
        for handle in handles:
            handle.remove()
    ends = [i for i, (module, *_) in enumerate(order) if module is stack[-1]]
    run = [each for each in order if each[1] is not None]
    after = [module for module, *_ in order[ends[-1] + 1 :]] if ends else []
    reason = _why_not(stack, run, after, order[-1][2] if order else None, said)
    if reason:
        raise ValueError(_no_stack(model, reason))
    config = getattr(around, "config", model.config)
    return Stack(path, around, stack, tuple(names[id(m)] for m in after), run[0][1].shape[-1], config)


def _no_stack(model: nn.Module, reason: str) -> str:
    return (
        f"a side network is built beside one stack of blocks, and of this {type(model).__name__} that isn't possible: "
        f"{reason}. Adapter and LoRA change the blocks themselves."
    )


def _why_not(stack: Any, run: list[Any], after: list[nn.Module], last: Any, said: list[Any]) -> str | None:
    """What keeps the calls of a trial from being one stack with norms after it, or None."""
    if [module for module, *_ in run] != list(stack):
        return "its blocks aren't called once each, one after the other"
    shapes = {tuple(x.shape) for _, x, _ in run}
    if len(shapes) > 1 or len(next(iter(shapes))) != 3 or next(iter(shapes))[0] != 1:
        return f"its blocks get hidden states of the shapes {sorted(shapes)}, not (batch, seq, d)"
    for _, x, output in run:
        handed = [t for t in output if isinstance(t, Tensor)] if isinstance(output, tuple) else [first(output)]
        if len(handed) != 1 or handed[0] is None or handed[0].shape != x.shape:
            return "its blocks hand on more than hidden states"
    if others := [type(m).__name__ for m in after if not is_norm(m)]:
        return f"a {others[0]} reads what the blocks give, before anybody outside of them does"
    if len(said) != 1 or said[0] is None or said[0].shape != first(last).shape:
        return "what the blocks give isn't what the module around them gives"
    return None


def first(output: Any) -> Tensor | None:
    """The first tensor of what a module gives: of an output of transformers, the last hidden states."""
    values = output if isinstance(output, (tuple, list)) else (output,)
    values = tuple(output.values()) if isinstance(output, dict) else values
    return next((value for value in values if isinstance(value, Tensor)), None)


# ---- narrower blocks


def narrower(found: Stack, reduction: int, kept: Sequence[int], seed: int) -> tuple[Side, Any]:
    """Blocks as those of these indices, with their norms, r times as narrow, and the config that they are made from.

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
    side = Side(made.get_submodule(found.path.rpartition(".")[2]), [getattr(made, name) for name in found.norms])
    if len(side.blocks) != len(kept):
        raise ValueError(f"a {kind} of {len(kept)} blocks has {len(side.blocks)}; give layers=None, for all.")
    for name, p, own in _pairs(found, side, kept):
        if p.dim() != own.dim() or any(n not in (m, m // reduction) for n, m in zip(p.shape, own.shape, strict=True)):
            raise ValueError(
                f"{name!r} is {tuple(own.shape)} in this {kind} and {tuple(p.shape)} in one whose widths are divided by "
                f"{reduction}: expected each size, or that of it. Take Adapter or LoRA."
            )
    return side, small


def _divided(found: Stack, reduction: int, kept: Sequence[int]) -> Any:
    """The config with its widths divided, and as many layers as are kept."""
    small = copy.deepcopy(found.config)
    widths = {
        name: value for name, value in vars(small).items() if isinstance(value, int) and not isinstance(value, bool)
    }
    heads = getattr(small, "num_attention_heads", 1)
    head = widths.get("head_dim") or found.width // heads
    for what, size in (("the hidden states", found.width), ("a head", head)):
        if size % reduction or size == reduction:
            raise ValueError(f"reduction is {reduction}; it must divide the width of {what}, {size}, and leave 2.")
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
    pairs = []
    for name, p in side.named_parameters():
        room, index, key = name.split(".", 2)
        own: nn.Module = found.blocks[kept[int(index)]]
        own = own if room == "blocks" else found.around.get_submodule(found.norms[int(index)])
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
