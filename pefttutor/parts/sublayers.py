"""Where a model's sublayers end: the linear layers whose output goes into the residual sum.

    x ← x + f(x)          f: attention or feed-forward; its last linear layer is what is looked for

They are found in a trial and not by their names. With every linear layer cut off from its input, a gradient can flow
from the model's output back to a linear layer only along the residual sum: to `o_proj` and `down_proj`, but not to
`q_proj`, whose way leads through `o_proj`. A weight that it reaches elsewhere, as an expert's, belongs to a sublayer
that ends otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.data.trial import ordinary, trial
from pefttutor.parts.freezing import added_by_others
from pefttutor.parts.linear import all_linear

__all__ = ["Sublayer", "sublayers", "trial_inputs"]


@dataclass(frozen=True)
class Sublayer:
    """One sublayer. end: the linear layer that gives its output. start: the first that is called in it, which reads
    the sublayer's input. first, last: whether it is its block's first one, the self-attention, and its last one, the
    feed-forward; a decoder's attention to an encoder lies between."""

    end: str
    start: str
    first: bool
    last: bool


def sublayers(model: nn.Module, field: str = "target_modules") -> list[Sublayer]:
    """The sublayers of all blocks that a text or a picture reaches, in the order of the calls.

    field: where the layers may be named instead.

    Cost: a forward and a backward pass of three tokens, or of one picture.
    Raises: ValueError for a model that can't be tried, and for blocks with less than two sublayers, or with one that
        doesn't end in a linear layer.
    """
    lists = {f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    layers = {n: m for n, m in all_linear(model, set()).items() if n.startswith(tuple(lists))}
    calls, past = _trial(model, layers, lists, field)
    ends = list(dict.fromkeys(name for name, reaches in calls if reaches))
    block_of = {name: _block(name, ends, lists) for name in ends}
    called = {name for name, _ in calls}
    found = next(
        (f"{name!r} is the only end of one in its block" for name in ends if not block_of[name]), None
    )
    silent = [n for n in layers if n not in called and n.startswith(tuple(b for b in block_of.values() if b))]
    if silent:
        found = f"{silent[0]!r} isn't called by every text (is it an expert?)"
    if past or not ends:
        found = f"{past[0]!r} reaches the sum without one" if past else "none was found"
    if found:
        raise ValueError(
            "an adapter's places are found where every block has two sublayers or more, each with a linear layer at "
            f"its end, and in this {type(model).__name__} {found}: {_way_out(model, field)}"
        )
    last = {block: name for name, block in block_of.items()}
    first = {block: name for name, block in reversed(block_of.items())}
    outer = {name: (first[block] == name, last[block] == name) for name, block in block_of.items()}
    return [Sublayer(name, _start(name, calls, block_of), *outer[name]) for name in ends]


def _way_out(model: nn.Module, field: str) -> str:
    names = dict.fromkeys(name.rpartition(".")[2] for name in all_linear(model, set()))
    return f"name in {field} the layers whose output is to be adapted. It has: {', '.join(names) or 'none'}."


def _start(end: str, calls: list[tuple[str, bool]], block_of: dict[str, str]) -> str:
    """The first layer that is called in the block of this end after the end before it."""
    since: list[str] = []
    for name, _ in calls:
        since = [*since, name] if name.startswith(block_of[end]) else []
        if name == end:
            return since[0]
        if name in block_of:
            since = []
    raise AssertionError(f"{end} wasn't called")


def _block(name: str, ends: list[str], lists: set[str]) -> str:
    """The smallest element of a list of modules that holds this end and another one; "" without one."""
    steps = name.split(".")
    for i in range(len(steps) - 1, 0, -1):
        path, around = (".".join([*steps[:j], ""]) for j in (i, i - 1))
        if around in lists and sum(end.startswith(path) for end in ends) > 1:
            return path
    return ""


def _trial(
    model: nn.Module, layers: dict[str, nn.Module], lists: set[str], field: str
) -> tuple[list[tuple[str, bool]], list[str]]:
    """Each call of a layer, and whether its output reaches the model's past all others; weights that do so too."""
    calls: list[tuple[str, Tensor]] = []

    def cut(layer: nn.Module, args: Any) -> Any:
        return (args[0].detach(), *args[1:]) if args else None

    def note(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
            calls.append((name, output.detach().requires_grad_()))
            return calls[-1][1].clone()  # a model may add to it in place

        return hook

    own = {id(p) for layer in layers.values() for p in layer.parameters()} | added_by_others(model)
    others = {
        name: p
        for name, p in model.named_parameters()
        if p.dim() > 1 and p.is_floating_point() and id(p) not in own and name.startswith(tuple(lists))
    }
    flags = {p: p.requires_grad for p in others.values()}
    handles = [layer.register_forward_pre_hook(cut) for layer in layers.values()]
    handles += [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        with trial(model), torch.enable_grad():
            for p in others.values():
                p.requires_grad_(True)
            output = model(**trial_inputs(model))
            said = [t.float().sum() for t in output.values() if isinstance(t, Tensor) and t.requires_grad]
            seen = [*(leaf for _, leaf in calls), *others.values()]
            found = torch.autograd.grad(torch.stack(said).sum(), seen, allow_unused=True)
    except Exception as error:  # whatever a model raises here means: it can't be tried in this way
        raise ValueError(
            f"an adapter's places are found in a trial, and a {type(model).__name__} can't be tried "
            f"({type(error).__name__}: {error}): {_way_out(model, field)}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for p, flag in flags.items():
            p.requires_grad_(flag)
    reaches = [gradient is not None for gradient in found]
    past = [name for name, reached in zip(others, reaches[len(calls) :], strict=True) if reached]
    return [(name, reached) for (name, _), reached in zip(calls, reaches, strict=False)], past


def trial_inputs(model: Any) -> dict[str, Tensor]:
    """Three tokens, or one picture, to try the model with; without values where the model has none."""
    reads = getattr(model, "main_input_name", None)
    config: Any = getattr(model, "config", None)
    if reads == "pixel_values":
        weight, side = next(model.parameters()), config.image_size
        side = side if isinstance(side, int) else max(side)
        return {reads: weight.new_zeros(1, config.num_channels, side, side)}
    if reads != "input_ids":
        raise ValueError(f"it reads {reads or 'something of its own'}, not tokens or a picture")
    table = model.get_input_embeddings().weight
    if table.is_meta:
        config.pad_token_id = None  # whether one is among the tokens can't be asked; the trial puts it back
    tokens = torch.tensor([ordinary(model, len(table), 3)], device="cpu").to(table.device)
    return {reads: tokens} | ({"decoder_input_ids": tokens} if config.is_encoder_decoder else {})
