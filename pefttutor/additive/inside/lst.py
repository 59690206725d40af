"""Ladder side-tuning: a small network beside the model reads what every block says, and speaks in its place.

    s₀ = D₀ h₀        s ← blockᵢ(μᵢ s + (1 − μᵢ) Dᵢ hᵢ),  μᵢ = σ(αᵢ / T)        what is said: U · norm(s)

The model itself only runs forward. Since nothing of it lies between what trains and the loss, autograd keeps none of
what its blocks compute inside.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.data.trial import trial
from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.added import Added
from pefttutor.parts.attachment import added_key
from pefttutor.parts.freezing import fully_trained, train_fully
from pefttutor.parts.ladder import Ladder, Reading, Rung
from pefttutor.parts.settings import check_choice, check_names, check_number, check_whole
from pefttutor.parts.side_network import Side, Stack, narrower, stack_of, thinned
from pefttutor.parts.sublayers import trial_inputs

__all__ = ["LST"]


@dataclass(frozen=True, kw_only=True)
class LST:
    """Train a ladder of narrow blocks beside a frozen model, which reads its hidden states through learned gates.

    s ← blockᵢ(μᵢ s + (1 − μᵢ) Dᵢ hᵢ)   for every block i of the model, which gives hᵢ;  μᵢ = σ(αᵢ / T)

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    >>> LST(reduction=4).count(BertForSequenceClassification(config))
    2282

    reduction: r, by which the widths of the stream, of each head and of the feed-forward are divided.
    layers: the blocks that have one beside them, counted from 0; None for all.
    gate_temperature: T. α starts at 0, so that μ starts at ½.
    start: "pruned" keeps every r-th feature of the model's own blocks and norms; D picks these features and U puts them
        back in their places. "random" draws all as the model's class does, and D and U from N(0, 0.01²).
    modules_to_save: modules that train fully and are saved along, such as a new head ("classifier").
    init_seed: fixes what is drawn, whatever the device.

    The model says U · norm(s) where it said its last hidden states, also at the start: it doesn't start as it was. Its
    head, and a BERT's pooler, read that. Nothing below the side network gets a gradient, so what is attached to the
    blocks learns nothing through it. Of two ladders that take effect the earlier one speaks. The authors prune by the
    weights' Fisher information on the task; every r-th feature needs no data, and lets the positions' rotations stay
    what they were.

    Shapes: D (d/r, d), U (d, d/r), with biases; a block's own, divided by r.
    Cost: it trains about 1/r² of the blocks, and d²/r for each D and for U (`count`); a forward pass takes so much
        more, and a backward pass only that. For these D autograd keeps the hᵢ, (batch, seq, d) a block. It can't be
        merged.
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
                raise ValueError(
                    f"layers is {self.layers!r}; it must be rising whole numbers, such as (0, 2, 4)."
                )
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
            stack, key = found.path.rpartition(".")[2], added_key("lst", name)
            ladder = Ladder(key, stack, kept, self.reduction, self.gate_temperature, side, config)
            new.add(Added(ladder.held(found, name, values)))
            _drop_values(side)
            rungs = [(found.blocks[i], Rung(ladder, i)) for i in kept]
            before: list[Any] = [(found.around, ladder.note), (found.blocks[0], ladder.enter)]
            before += [(block, rung.enter) for block, rung in rungs]
            after: list[Any] = [(found.around, ladder.speak), *((block, rung.leave) for block, rung in rungs)]
            new.add(Reading(before, after))
            for part in fully:
                new.add(part)
            _try(model)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: the side network, its D, U and gates, and modules_to_save."""
        found, kept = self._places(model)
        side, _ = narrower(found, self.reduction, kept, self.init_seed)
        fully, _ = fully_trained(model, self.modules_to_save)
        own = sum(p.numel() for p in side.parameters()) + ladder_values(
            found.width, self.reduction, len(kept)
        )
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
            values |= {f"{key}.weight": picks.clone() for key in downs} | {
                "up.weight": picks.t().contiguous()
            }
        else:
            draw = torch.Generator().manual_seed(self.init_seed)
            shapes = {f"{key}.weight": (narrow, d) for key in downs} | {"up.weight": (d, narrow)}
            values |= {
                key: torch.empty(*shape, device="cpu").normal_(0, 0.01, generator=draw)
                for key, shape in shapes.items()
            }
        values |= {f"{key}.bias": torch.zeros(narrow) for key in downs} | {"up.bias": torch.zeros(d)}
        return values | {f"gate.{i}": torch.zeros(1) for i in range(ends)}


def ladder_values(d: int, r: int, rungs: int) -> int:
    """How many values tie a side network to its model: D₀ and a D for each rung, a gate for each, and U.

    >>> ladder_values(d=6, r=2, rungs=1)                                   # 2 · (6 · 3 + 3) + 1 + 3 · 6 + 6
    67
    """
    narrow = d // r
    return (rungs + 1) * (d + 1) * narrow + rungs + (narrow + 1) * d


def _drop_values(side: Side) -> None:
    """Leave the side network its form, which is called with parameters that lie in the model."""
    for module in side.modules():
        for key, p in module._parameters.items():
            if p is not None:
                module._parameters[key] = nn.Parameter(
                    torch.empty_like(p, device="meta"), requires_grad=False
                )


def _try(model: Any) -> None:
    """Raise ValueError if the model can't be run with its side network."""
    try:
        with trial(model):
            model(**trial_inputs(model))
    except Exception as error:  # whatever comes here means: narrower blocks can't be called like this
        raise ValueError(
            f"the blocks of a {type(model).__name__} can't be called in narrow ({type(error).__name__}: {error}); "
            "Adapter and LoRA change the blocks themselves."
        ) from error
