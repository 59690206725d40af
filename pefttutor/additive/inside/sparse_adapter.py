"""SparseAdapter: cut most of an adapter's weights away before training, by a score, and train what is left.

    h ← h + s · (σ(h (m_d ⊙ W_d)ᵀ + b_d) (m_u ⊙ W_u)ᵀ + b_u)          m: 1 for the best-scored weights, 0 for the others

With the number of weights kept the same, a bottleneck that is wider and sparser ("large-sparse") may do better than a
narrow dense one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.adapter_places import adapter_places, check_narrow
from pefttutor.parts.attachment import added_key
from pefttutor.parts.bottleneck import ACTIVATIONS, Bottleneck, draw_projections, width_of
from pefttutor.parts.freezing import fully_trained, train_fully
from pefttutor.parts.information import total_gradient
from pefttutor.parts.part import hold
from pefttutor.parts.ranking import exact_share, largest_share, without_values
from pefttutor.parts.settings import (
    check_choice,
    check_examples,
    check_fraction,
    check_names,
    check_number,
    check_whole,
)

__all__ = ["SparseAdapter"]

SCORES = ("random", "magnitude", "snip")
MATRICES = ("down", "up")
PROBE = "probe-of-snip"  # the dense adapter on a copy of the model
Drawn = dict[str, dict[str, Tensor]]  # the projections of each adapter, by its layer's name


@dataclass(frozen=True, kw_only=True)
class SparseAdapter:
    """Bottleneck adapters, of whose weights only the best-scored are kept, all adapters together.

    h ← h + s · (σ(h (m_d ⊙ W_d)ᵀ + b_d) (m_u ⊙ W_u)ᵀ + b_u)

    >>> model = nn.ModuleDict({"down_proj": nn.Linear(40, 24)})
    >>> SparseAdapter(bottleneck=20, fraction=.2, target_modules=("down_proj",)).count(model)    # .2·2·20·24 + 20 + 24
    236

    fraction: the share of the weights that is kept. (The paper names what is cut, sparsity, and so does its code, where
        that setting is the share that is kept, too.) Biases stay.
    score: "random"; "magnitude", |w| at the start; or "snip", |w · ∂L/∂w| there, for which `attach` gets examples.
    placement, bottleneck, activation, scaling, target_modules: as in `Adapter`, serial.
    modules_to_save: modules that train fully and are saved along, such as a new head ("classifier").
    init_std: both W are drawn from a normal within ± 2 std, and the biases are 0. If W_u were 0, as an adapter's may
        be, its magnitudes were all alike, and so were snip's for W_d: it would get no gradient. So the model starts
        near the base and not at it.
    init_seed: fixes the random weights and the random score, whatever the device.

    Only the kept weights are parameters, as vectors beside their places: what is cut is 0 and no optimizer sees it.

    Shapes: kept (k_d), b_d (m), kept (k_u), b_u (d), with k_d + k_u over all adapters ⌊fraction · Σ 2·m·d⌋.
    Cost: it trains ⌊fraction · Σ 2·m·d⌋ + Σ (m + d) values (`count`). Each call puts the weights back in their places
        and takes a dense adapter's 4·m·d FLOPs a token; it can't be merged. Snip takes a copy of the model and a
        backward pass over the examples.
    Raises: ValueError for snip without examples, a name that finds nothing, a bottleneck above the width, or a model
        whose sublayers aren't found.
    Source: He et al. 2022, arXiv:2210.04284, section 3; SNIP: Lee et al. 2019, arXiv:1810.02340, eq. 5.
    """

    fraction: float = 0.2
    score: str = "random"
    placement: str = "pfeiffer"
    bottleneck: int = 64
    activation: str = "gelu"
    scaling: float = 1.0
    target_modules: str | Collection[str] | None = None
    modules_to_save: Collection[str] = ()
    init_std: float = 0.02
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_fraction(self)
        check_choice(self, "score", SCORES)
        check_choice(self, "placement", ("pfeiffer", "houlsby"))
        check_whole(self, "bottleneck")
        check_choice(self, "activation", tuple(ACTIVATIONS))
        check_number(self, "scaling", above=0)
        check_number(self, "init_std", above=0)
        check_whole(self, "init_seed", least=0)
        check_names(self, "target_modules", "modules_to_save")

    @torch.inference_mode(mode=False)  # what is drawn could never be trained
    def attach(
        self, model: nn.Module, examples: Sequence[Any] | None = None, *, name: str = DEFAULT, **how: Any
    ) -> nn.Module:
        """Freeze `model`, score and cut its new adapters, and return it.

        examples, how: what snip takes the gradient of (see `fisher_information`).

        Raises: ValueError if the name is in use, a layer can't be adapted, or snip gets no examples. The model is then
            as it was.
        """
        drawn = self._drawn(model)
        masks = largest_share(self._scores(model, drawn, examples, **how), self.fraction)
        chosen = {
            key: mask if mask.is_meta else mask.flatten().nonzero()[:, 0] for key, mask in masks.items()
        }
        return self._attached(model, drawn, chosen, name)

    @torch.inference_mode(mode=False)
    def restore(self, model: nn.Module, tensors: Mapping[str, Tensor], *, name: str = DEFAULT) -> nn.Module:
        """Attach with the places that a file's tensors say were kept.

        Raises: ValueError if they say none that fit.
        """
        drawn = self._drawn(model)
        chosen: dict[str, Tensor] = {}
        for path, w in drawn.items():
            for which in MATRICES:
                key, size = f"{path}.sparse_{which}_place", w[f"adapter_{which}"].numel()
                place = tensors.get(key)
                fits = place is not None and place.dtype == torch.int64 and place.dim() == 1
                if (
                    place is None
                    or not fits
                    or (place.numel() and not 0 <= int(place.min()) <= int(place.max()) < size)
                ):
                    raise ValueError(f"{key!r} isn't there, or doesn't hold places among {size} weights.")
                chosen[f"{path}.{which}"] = place
        return self._attached(model, drawn, chosen, name)

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: ⌊fraction · Σ 2·m·d⌋ + Σ (m + d), and modules_to_save."""
        m, widths = self.bottleneck, [width_of(layer) for layer in self._places(model).values()]
        own = max(1, int(exact_share(self.fraction, sum(2 * m * d for d in widths)))) + sum(
            m + d for d in widths
        )
        fully, _ = fully_trained(model, self.modules_to_save)
        return own + sum(model.get_parameter(name).numel() for name in fully)

    def _attached(self, model: nn.Module, drawn: Drawn, chosen: Mapping[str, Tensor], name: str) -> nn.Module:
        with attaching(model, self, name) as new:
            fully = train_fully(model, (), self.modules_to_save)
            for path, layer in self._places(model).items():
                places = {which: chosen[f"{path}.{which}"] for which in MATRICES}
                new.add(Cut(path, layer, name, drawn[path], places, **self._how()))
            for part in fully:
                new.add(part)
        return model

    def _how(self) -> dict[str, Any]:
        return {"activation": self.activation, "scaling": self.scaling}

    def _places(self, model: nn.Module) -> dict[str, nn.Module]:
        layers = adapter_places(model, self.placement, self.target_modules, self.modules_to_save)
        check_narrow(layers, self.bottleneck)
        return layers

    def _drawn(self, model: nn.Module) -> Drawn:
        generator = torch.Generator().manual_seed(self.init_seed)
        layers, m = self._places(model), self.bottleneck
        return {
            path: draw_projections(width_of(layer), m, generator, self.init_std)
            for path, layer in layers.items()
        }

    def _scores(
        self, model: nn.Module, drawn: Drawn, examples: Sequence[Any] | None, **how: Any
    ) -> dict[str, Tensor]:
        """A score of each weight, by its layer and matrix."""
        weights = {
            f"{path}.{which}": w[f"adapter_{which}"] for path, w in drawn.items() for which in MATRICES
        }
        if self.score == "magnitude" or without_values(weights):
            return {key: weight.abs() for key, weight in weights.items()}
        if self.score == "random":
            generator = torch.Generator().manual_seed(self.init_seed)
            return {key: torch.rand(w.shape, generator=generator, device="cpu") for key, w in weights.items()}
        given = check_examples(self, examples, labels=not how)
        dense = copy.deepcopy(model)
        with attaching(dense, self, PROBE) as new:
            for path, layer in self._places(dense).items():
                new.add(Bottleneck(path, layer, new.name, drawn[path], **self._how()))
        gradient = total_gradient(dense, given, **how)
        by_name = {key: added_key("{0}.adapter_{2}".format(*key.rpartition(".")), PROBE) for key in weights}
        return {
            key: (w.to(gradient[by_name[key]]) * gradient[by_name[key]]).abs() for key, w in weights.items()
        }


class Cut(Bottleneck):
    """A bottleneck adapter of which some weights are kept, in their places."""

    makes = True

    def __init__(
        self,
        path: str,
        layer: nn.Module,
        name: str,
        drawn: Mapping[str, Tensor],
        places: Mapping[str, Tensor],
        **how: Any,
    ) -> None:
        """drawn: the dense adapter. places: of the weights that are kept, by their matrix."""
        tensors = {}
        for which in MATRICES:
            dense, place = drawn[f"adapter_{which}"], places[which]
            tensors[f"sparse_{which}_kept"] = dense.flatten()[place.to(dense.device)]
            tensors[f"sparse_{which}_bias"] = drawn[f"adapter_{which}_bias"]
        super().__init__(path, layer, name, tensors, **how)
        for which, place in places.items():
            key = added_key(f"sparse_{which}_place", name)
            hold(layer, key, place.to(self.trained()[0].device))
            self.added_keys += (key,)

    def projections(self) -> list[Tensor]:
        kept_down, down_bias, kept_up, up_bias = self.trained()
        shapes = (self.bottleneck, self.width), (self.width, self.bottleneck)
        full = []
        for kept, which, shape in zip((kept_down, kept_up), MATRICES, shapes, strict=True):
            place = self.layer.get_buffer(added_key(f"sparse_{which}_place", self.name))
            full.append(kept.new_zeros(math.prod(shape)).index_put((place,), kept).view(shape))
        return [full[0], down_bias, full[1], up_bias]
