"""Bottleneck adapters: a small network of two layers after, or beside, the sublayers of every block.

    h ← h + s · (σ(h W_dᵀ + b_d) W_uᵀ + b_u)          W_d (m, d), W_u (d, m), m ≪ d

Houlsby et al. put one after the attention and one after the feed-forward sublayer, before the residual sum; Pfeiffer et
al. one after the feed-forward alone; He et al. beside it: their adapter reads the sublayer's input.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.adapter_places import (
    Places,
    adapter_places,
    add_bottlenecks,
    check_narrow,
    parallel_places,
)
from pefttutor.parts.bottleneck import ACTIVATIONS, width_of
from pefttutor.parts.freezing import fully_trained, train_fully
from pefttutor.parts.norms import norm_parameters
from pefttutor.parts.settings import check_choice, check_names, check_number, check_whole

__all__ = ["Adapter"]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A bottleneck adapter in every block: after its sublayers, or beside its feed-forward.

    h ← h + s · (σ(h W_dᵀ + b_d) W_uᵀ + b_u),  h the sublayer's output;  parallel: h ← h + s · (σ(x W_dᵀ + b_d) …)

    >>> model = nn.ModuleDict({"down_proj": nn.Linear(40, 24)})
    >>> Adapter(bottleneck=5, target_modules=("down_proj",)).count(model)       # 2 · 5 · 24 + 5 + 24
    269

    placement: "houlsby" (after every sublayer), "pfeiffer" (after the feed-forward) or "parallel" (beside it).
    bottleneck: the features m in the middle. activation: σ: gelu, relu, silu or tanh.
    scaling: s; 4 makes it the scaled parallel adapter.
    target_modules: the layers whose output is adapted, as names, their last parts, or one expression; then they count,
        and the placement only says what an adapter reads. None finds the layers that end the sublayers, in a trial.
        A norm that follows the residual sum z may be named too: y = N(z + A(N(z))), which AdapterHub calls Pfeiffer.
    input_modules: with named targets and "parallel": for each, in the model's order, the layer whose input is read.
    skip_blocks: numbers of blocks without adapters (AdapterDrop): below the first adapter all is the base, bit for bit.
        A block's number is the first in its layers' names.
    train_norms: whether the norms train too, as Houlsby et al. do it; those of skipped blocks don't, nor, if there
        are some, those outside of blocks.
    modules_to_save: modules that train fully and are saved along, such as a new head ("classifier").
    init_std: None starts W_d and b_d as in a new linear layer and W_u and b_u at 0, so that the model starts as it
        was, exactly; a number draws both W from a normal within ± 2 std, near the identity (Houlsby et al.: 0.01).
    init_seed: fixes the random weights, whatever the device.

    Where a model drops out some of a sublayer's output, the adapter comes before that, in the papers' code after.

    Shapes: W_d (m, d), b_d (m), W_u (d, m), b_u (d).
    Cost: it trains 2·m·d + m + d values an adapter (`count`) and takes 4·m·d FLOPs more a token; it can't be merged.
        Finding the layers takes a forward and a backward pass of three tokens.
    Raises: ValueError for a name that finds nothing, a bottleneck above the width, a block that isn't there, or a model
        whose sublayers aren't found.
    Source: Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021, arXiv:2005.00247; He et al. 2022,
        arXiv:2110.04366, table 1; AdapterDrop: Rücklé et al. 2021, arXiv:2010.11918; chapter section 4.2.
    """

    placement: str = "houlsby"
    bottleneck: int = 64
    activation: str = "gelu"
    scaling: float = 1.0
    target_modules: str | Collection[str] | None = None
    input_modules: str | Collection[str] | None = None
    skip_blocks: Collection[int] = ()
    train_norms: bool = False
    modules_to_save: Collection[str] = ()
    init_std: float | None = None
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self, "placement", ("houlsby", "pfeiffer", "parallel"))
        check_whole(self, "bottleneck")
        check_choice(self, "activation", tuple(ACTIVATIONS))
        check_number(self, "scaling", above=0)
        check_choice(self, "train_norms", (True, False))
        if self.init_std is not None:
            check_number(self, "init_std", above=0)
        check_whole(self, "init_seed", least=0)
        check_names(self, "target_modules", "input_modules", "modules_to_save")
        if not isinstance(self.skip_blocks, Collection) or not all(type(i) is int for i in self.skip_blocks):
            raise ValueError(
                f"skip_blocks is {self.skip_blocks!r}; it must be numbers of blocks, such as (0, 1)."
            )
        object.__setattr__(self, "skip_blocks", tuple(self.skip_blocks))
        wanted = self.placement == "parallel" and self.target_modules is not None
        if (self.input_modules is not None) != wanted:
            raise ValueError(
                "input_modules says what parallel adapters read where target_modules names their layers: with "
                "placement='parallel' give both or neither, otherwise leave it out."
            )

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, put the adapters in, and return it.

        Raises: ValueError if the name is in use or a layer can't be adapted. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            generator = torch.Generator().manual_seed(self.init_seed)
            fully = train_fully(model, self._norms(model), self.modules_to_save)
            how = {"activation": self.activation, "scaling": self.scaling, "std": self.init_std}
            add_bottlenecks(new, model, self._places(model), self.bottleneck, generator, **how)
            for part in fully:
                new.add(part)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: Σ (2·m·d + m + d), the norms', and modules_to_save."""
        m, widths = self.bottleneck, [width_of(layer) for layer, _ in self._places(model).values()]
        names = {*self._norms(model), *fully_trained(model, self.modules_to_save)[0]}
        return sum(2 * m * d + m + d for d in widths) + sum(model.get_parameter(n).numel() for n in names)

    def _places(self, model: nn.Module) -> Places:
        """The adapted layers by name, without those of skipped blocks."""
        named, saved = self.target_modules, self.modules_to_save
        places: Places
        if self.placement == "parallel":
            places = parallel_places(model, named, self.input_modules, saved)
        else:
            layers = adapter_places(model, self.placement, named, saved)
            places = {path: (layer, None) for path, layer in layers.items()}
        numbers = {path: _block_number(path) for path in places}
        absent = [i for i in self.skip_blocks if i not in numbers.values()]
        if absent:
            there = sorted({i for i in numbers.values() if i is not None})
            raise ValueError(f"skip_blocks: no adapted layer is in a block {absent[0]}; there are {there}.")
        places = {path: place for path, place in places.items() if self._kept(path)}
        check_narrow({path: layer for path, (layer, _) in places.items()}, self.bottleneck)
        return places

    def _kept(self, path: str) -> bool:
        return _block_number(path) not in self.skip_blocks

    def _norms(self, model: nn.Module) -> list[str]:
        """The parameters of the norms that train."""
        names = norm_parameters(model) if self.train_norms else []
        if self.skip_blocks:
            names = [name for name in names if _block_number(name) is not None and self._kept(name)]
        return names


def _block_number(path: str) -> int | None:
    """The first number in a name: 3 in "model.layers.3.mlp.down_proj"."""
    return next((int(step) for step in path.split(".") if step.isdigit()), None)
