"""Ladder side-tuning: a small network beside the model reads what every block says, and speaks in its place.

    s₀ = D₀ h₀        s ← blockᵢ(μᵢ s + (1 − μᵢ) Dᵢ hᵢ),  μᵢ = σ(αᵢ / T)        what is said: U · norm(s)

The model itself only runs forward. Since nothing of it lies between what trains and the loss, autograd keeps none of
what its blocks compute inside.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor.data.trial import trial
from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.added import Added
from pefttutor.parts.attachment import added_key
from pefttutor.parts.beside import caches_beside, carry
from pefttutor.parts.freezing import fully_trained, train_fully
from pefttutor.parts.settings import check_choice, check_names, check_number, check_whole
from pefttutor.parts.side_network import Side, Stack, first, narrower, stack_of, thinned
from pefttutor.parts.streams import CACHES, Hooked, hidden_states, named_arguments, seen_before
from pefttutor.parts.sublayers import trial_inputs

__all__ = ["LST"]

HELD = (*CACHES, "layer_past", "past_key_value")  # what blocks call their cache


@dataclass(frozen=True, kw_only=True)
class LST:
    """Train a ladder of narrow blocks beside a frozen model, which reads its hidden states through learned gates.

    s ← blockᵢ(μᵢ s + (1 − μᵢ) Dᵢ hᵢ)   for every block i of the model, which gives hᵢ;  μᵢ = σ(αᵢ / T)

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    >>> LST(reduction=4).count(BertForSequenceClassification(config))
    2402

    reduction: r, by which the widths of the stream, of each head and of the feed-forward are divided.
    layers: the blocks that have one beside them, counted from 0; None for all.
    gate_temperature: T. α starts at 0, so that μ starts at ½.
    start: "pruned" keeps every r-th feature of the model's own blocks and norms; D picks these features and U puts them
        back in their places. "random" draws all as the model's class does, and D and U from N(0, 0.01²).
    modules_to_save: modules that train fully and are saved along, such as a new head ("classifier").
    init_seed: fixes what is drawn, whatever the device.

    The model says U · norm(s) where it said its last hidden states, also at the start: it doesn't start as it was. Its
    head, and a BERT's pooler, read that. Nothing below the side network gets a gradient, so what is attached to the
    blocks learns nothing through it. The authors prune by the weights' Fisher information on the task; every r-th
    feature needs no data, and lets the positions' rotations stay what they were.

    Shapes: D (d/r, d), U (d, d/r), with biases; a block's own, divided by r.
    Cost: it trains about 1/r² of the blocks, and d²/r for each D and for U (`count`); a forward pass costs as much more,
        and a backward pass only that. For these D autograd keeps the hᵢ, (batch, seq, d) a block. It can't be merged.
    Raises: ValueError for a model that isn't one stack of blocks, such as an encoder-decoder, or whose widths r doesn't
        divide.
    Source: Sung et al. 2022, arXiv:2206.06522, section 3; gates, D's biases and T as in the authors' code.
    """

    reduction: int = 8
    layers: Collection[int] | None = None
    gate_temperature: float = 0.1
    start: str = "pruned"
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_whole(self, "reduction", least=2)
        check_number(self, "gate_temperature", above=0)
        check_choice(self, "start", ("pruned", "random"))
        check_whole(self, "init_seed", least=0)
        check_names(self, "modules_to_save")
        if self.layers is not None:
            layers = tuple(self.layers) if isinstance(self.layers, Collection) else (self.layers,)
            whole = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in layers)
            if not whole or not layers or list(layers) != sorted({*layers}):
                raise ValueError(f"layers is {self.layers!r}; it must be rising whole numbers, such as (0, 2, 4).")
            object.__setattr__(self, "layers", layers)

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, build the side network beside it, let that speak, and return the model.

        Raises: ValueError if the name is in use, or the model can't have one. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            fully = train_fully(model, (), self.modules_to_save)
            found, kept = self._places(model)
            side, config = narrower(found, self.reduction, kept, self.init_seed)
            values = self._start(found, side, kept)
            ladder = _Ladder(added_key("lst", name), found.path.rpartition(".")[2], kept, self, side, config)
            new.add(Added(ladder.held(found, name, values)))
            _drop_values(side)
            rungs = [(found.blocks[i], _Rung(ladder, i)) for i in kept]
            before: list[Any] = [(found.around, ladder.note), (found.blocks[0], ladder.enter)]
            before += [(block, rung.enter) for block, rung in rungs]
            after: list[Any] = [(found.around, ladder.speak), *((block, rung.leave) for block, rung in rungs)]
            new.add(_Reading(before, after))
            for part in fully:
                new.add(part)
            _try(model)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: the side network, its D, U and gates, and modules_to_save."""
        found, kept = self._places(model)
        side, _ = narrower(found, self.reduction, kept, self.init_seed)
        fully, _ = fully_trained(model, self.modules_to_save)
        d, narrow = found.width, found.width // self.reduction
        own = sum(p.numel() for p in side.parameters()) + len(kept)
        own += (len(kept) + 1) * (d + 1) * narrow + (narrow + 1) * d
        return own + sum(model.get_parameter(name).numel() for name in fully)

    def _places(self, model: nn.Module) -> tuple[Stack, tuple[int, ...]]:
        found = stack_of(model)
        depth = len(found.blocks)
        kept = tuple(range(depth)) if self.layers is None else tuple(self.layers)
        if kept[-1] >= depth:
            raise ValueError(f"layers has {kept[-1]}, and this model has the blocks 0 to {depth - 1}.")
        return found, kept

    def _start(self, found: Stack, side: Side, kept: tuple[int, ...]) -> dict[str, Tensor]:
        """All that trains at its start, by its name in the side network, or by what it is."""
        d, narrow, ends = found.width, found.width // self.reduction, len(kept)
        values = {name: p.detach() for name, p in side.named_parameters()}
        downs = ["first", *(f"read.{i}" for i in range(ends))]
        if self.start == "pruned":
            values = thinned(found, side, kept)
            picks = torch.eye(d)[:: self.reduction]
            values |= {f"{key}.weight": picks.clone() for key in downs} | {"up.weight": picks.t().contiguous()}
        else:
            draw = torch.Generator().manual_seed(self.init_seed)
            shapes = {f"{key}.weight": (narrow, d) for key in downs} | {"up.weight": (d, narrow)}
            values |= {
                key: torch.empty(*shape, device="cpu").normal_(0, 0.01, generator=draw)
                for key, shape in shapes.items()
            }
        values |= {f"{key}.bias": torch.zeros(narrow) for key in downs} | {"up.bias": torch.zeros(d)}
        return values | {f"gate.{i}": torch.zeros(1) for i in range(ends)}


def _drop_values(side: Side) -> None:
    """Leave the side network its form, which is called with parameters that lie in the model."""
    for module in side.modules():
        for key, p in module._parameters.items():
            if p is not None:
                module._parameters[key] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)


def _try(model: Any) -> None:
    """Raise ValueError if the model can't be run with its side network."""
    try:
        with trial(model):
            model(**trial_inputs(model))
    except Exception as error:  # whatever comes here means: its narrower blocks can't be called as its own are
        raise ValueError(
            f"the blocks of a {type(model).__name__} can't be called in narrow ({type(error).__name__}: {error}); "
            "Adapter and LoRA change the blocks themselves."
        ) from error


class _Reading(Hooked):
    """The hooks of a ladder."""

    @property
    def ladder(self) -> _Ladder:
        return self.hooks[0][1].__self__  # type: ignore[attr-defined]

    def kept_aside(self) -> list[Tensor]:
        return [*self.ladder.side.parameters(), *self.ladder.side.buffers()]


@dataclass(eq=False)
class _Ladder:
    """What the side network is, and what it reads in a call of the model.

    stack: what the module around the blocks calls them. places: where each tensor lies, by its name: a block's index,
    or None for the module around, and the key.
    """

    prefix: str
    stack: str
    kept: tuple[int, ...]
    method: LST
    side: Side
    config: Any
    places: dict[str, tuple[int | None, str]] = field(default_factory=dict)
    filled: bool | None = False  # whether the cache held something before this call
    entered: Tensor | None = field(default=None, repr=False)
    calls: dict[int, dict[str, Any]] = field(default_factory=dict, repr=False)
    said: dict[int, Tensor] = field(default_factory=dict, repr=False)
    rank: ClassVar[int] = 1  # see `Hooked`: after virtual tokens, which its blocks get too

    def held(self, found: Stack, name: str, values: dict[str, Tensor]) -> list[tuple[nn.Module, str, str, Tensor]]:
        """All that trains, each with the module that holds it: the block that it stands beside, or that around."""
        held = []
        for own, value in values.items():
            block, label = self._place(own, found.norms)
            key = added_key(f"lst_{label.replace('.', '_')}", name)
            module = found.around if block is None else found.blocks[block]
            path = found.path.rpartition(".")[0] if block is None else f"{found.path}.{block}"
            like = next(module.parameters())
            wide = torch.promote_types(like.dtype, torch.float32)
            held.append((module, path, key, nn.Parameter(value.to(like.device, wide))))
            self.places[own] = block, key
        return held

    def _place(self, own: str, norms: tuple[str, ...]) -> tuple[int | None, str]:
        """The block beside which a tensor stands, or None, and what it is called there."""
        room, _, rest = own.partition(".")
        if room in ("first", "up"):
            return None, own
        index, _, rest = rest.partition(".")
        if room == "norms":
            return None, f"{norms[int(index)]}.{rest}"
        return self.kept[int(index)], rest if room == "blocks" else f"{room}.{rest}".strip(".")

    def note(self, around: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the blocks run."""
        self.calls, self.said, self.entered = {}, {}, None
        cache, self.filled = seen_before(named_arguments(around, args, kwargs))
        if getattr(cache, "is_compileable", False):
            raise ValueError(
                "LST's side network has a cache of its own, and this one is of fixed length: in generate leave "
                "cache_implementation out."
            )

    def enter(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        self.entered = hidden_states(args, kwargs).detach()

    def speak(self, around: Any, args: Any, output: Any) -> Any:
        """After the blocks have run: what the side network makes of what they said, in the place of that."""
        entered, calls, said = self.entered, self.calls, self.said
        self.entered, self.calls, self.said = None, {}, {}
        if entered is None or set(said) != set(self.kept):
            raise ValueError("LST reads what every block says, and in this call some weren't run.")
        own = self._tensors(around)
        wide = own["up.weight"]

        def down(key: str, h: Tensor) -> Tensor:
            return F.linear(h.to(wide), own[f"{key}.weight"], own[f"{key}.bias"])

        cache = self._cache(calls[self.kept[0]])
        ends = range(len(self.kept))
        side: Side = self.side.train(around.training)
        given = {n: t for n, t in own.items() if n.startswith(("blocks.", "norms."))}
        given |= {name: buffer.to(wide.device) for name, buffer in side.named_buffers()}
        s = torch.func.functional_call(
            side,
            given,
            (
                down("first", entered),
                [down(f"read.{i}", said[self.kept[i]]) for i in ends],
                [(own[f"gate.{i}"] / self.method.gate_temperature).sigmoid() for i in ends],
                [self._narrow(calls[i], cache, wide) for i in self.kept],
            ),
        )
        return put(output, F.linear(s, own["up.weight"], own["up.bias"]))

    def _tensors(self, around: Any) -> dict[str, Tensor]:
        """What trains, by its name, on the device of what speaks."""
        stack = getattr(around, self.stack)
        found = {
            own: (around if block is None else stack[block]).get_parameter(key)
            for own, (block, key) in self.places.items()
        }
        device = found["up.weight"].device
        return {own: tensor.to(device) for own, tensor in found.items()}

    def _cache(self, call: dict[str, Any]) -> Any:
        """The side network's own cache, which that of the model carries along; None without one."""
        cache = next((call[key] for key in HELD if call.get(key) is not None), None)
        if cache is None:
            return None
        beside = caches_beside(cache, self.prefix) if self.filled is not False else None
        if beside is None:
            if self.filled:
                raise ValueError(
                    "LST goes on from the caches of the model and of its side network, and this cache was filled "
                    "without it: compute the text's beginning with the adapted model too."
                )
            from transformers import DynamicCache

            beside = (DynamicCache(config=self.config),)
            carry(cache, self.prefix, beside)
        return beside[0]

    def _narrow(self, call: dict[str, Any], cache: Any, wide: Tensor) -> dict[str, Any]:
        """What a block was called with, for the narrow one beside it: its own cache, and every r-th angle."""
        r = self.method.reduction

        def moved(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(moved, value))
            if not isinstance(value, Tensor):
                return value
            return value.to(wide) if value.is_floating_point() else value.to(wide.device)

        found = {key: moved(value) for key, value in call.items()}
        angles = found.get("position_embeddings")
        if isinstance(angles, tuple):
            if any(each.shape[-1] % (2 * r) for each in angles):
                raise ValueError(
                    f"reduction is {r}; it must leave pairs of the {angles[0].shape[-1]} features of a head that a "
                    "position rotates"
                )
            found["position_embeddings"] = tuple(each[..., ::r] for each in angles)
        return found | {key: cache for key in HELD if key in found and found[key] is not None}


@dataclass(eq=False)
class _Rung:
    """One block of the model: what it is called with, and what it says."""

    ladder: _Ladder
    index: int

    def enter(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        named = named_arguments(block, args, kwargs)
        own = hidden_states(args, kwargs)
        self.ladder.calls[self.index] = {key: value for key, value in named.items() if value is not own}

    def leave(self, block: nn.Module, args: Any, output: Any) -> None:
        said = first(output)
        assert said is not None
        self.ladder.said[self.index] = said.detach()


def put(output: Any, new: Tensor) -> Any:
    """The output, in which `new` stands for its first tensor."""
    if isinstance(output, Tensor):
        return new.to(output.dtype)
    if isinstance(output, (tuple, list)):
        at = next(i for i, value in enumerate(output) if isinstance(value, Tensor))
        return type(output)([*output[:at], new.to(output[at].dtype), *output[at + 1 :]])
    at = next(key for key, value in output.items() if isinstance(value, Tensor))
    output[at] = new.to(output[at].dtype)
    return output
