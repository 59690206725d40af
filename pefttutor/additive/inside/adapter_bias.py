"""AdapterBias: add one vector to what the feed-forward gives, as much of it as each token asks for.

    h ← h + α(x) v          α(x) = w · x + b;  x is what the feed-forward's last layer reads, and h what it gives

BitFit shifts all tokens alike; here one learned number a token says how far. Afterwards all of it goes into the
layer's own weight, W + v wᵀ, and bias, c + b v.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.adapter_places import sublayer_ends
from pefttutor.parts.freezing import fully_trained, train_fully
from pefttutor.parts.layer_change import LayerChange
from pefttutor.parts.linear import sizes, why_not_linear
from pefttutor.parts.modules import linear_targets
from pefttutor.parts.settings import check_names, check_whole
from pefttutor.parts.weight_delta import WeightDelta

__all__ = ["AdapterBias"]


@dataclass(frozen=True, kw_only=True)
class AdapterBias:
    """A shift of each feed-forward's output, the same direction for all tokens, and a length for each.

    y = W x + c + (w · x + b) v

    >>> model = nn.ModuleDict({"down_proj": nn.Linear(40, 24)})
    >>> AdapterBias(target_modules=("down_proj",)).count(model)                 # 40 + 1 + 24
    65

    target_modules: the layers whose output is shifted. None finds those that end the blocks' feed-forwards, in a trial.
    modules_to_save: modules that train fully and are saved along, such as a new head ("classifier"). The authors train
        the norm after each feed-forward and that of the embeddings, too: "layer.0.output.LayerNorm", … in a BERT.
    init_seed: fixes the random w and b, whatever the device.

    w and b start as in a new linear layer and v at 0, so the model starts as it was, exactly, and v alone gets a
    gradient at first. A layer without a bias c gets no b: nothing of it could hold b v, so the merged model would be of
    another form. Where a model drops out some of the output, the shift comes before that, in the authors' code after.

    Shapes: w (in), b (1), v (out).
    Cost: it trains in + out + 1 values a layer (`count`), and takes 2·(in + out) FLOPs more a token, none once merged.
    Raises: ValueError for a name that finds nothing, a layer that can't be shifted, or a model whose sublayers aren't
        found.
    Source: Fu et al. 2022, arXiv:2205.00305, section 3.
    """

    target_modules: str | Collection[str] | None = None
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_names(self, "target_modules", "modules_to_save")
        check_whole(self, "init_seed", least=0)

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, give its layers their vectors, and return it.

        Raises: ValueError if the name is in use or a layer can't be shifted. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            fully = train_fully(model, (), self.modules_to_save)
            generator = torch.Generator().manual_seed(self.init_seed)
            for path, layer in self._targets(model).items():
                new.add(TokenShift(path, layer, name, _drawn(layer, generator)))
            for part in fully:
                new.add(part)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: Σ in + out, and 1 where there is a bias; and modules_to_save."""
        fully, _ = fully_trained(model, self.modules_to_save)
        own = [sum(sizes(layer)) + _has_bias(layer) for layer in self._targets(model).values()]
        return sum(own) + sum(model.get_parameter(name).numel() for name in fully)

    def _targets(self, model: nn.Module) -> dict[str, nn.Module]:
        named = self.target_modules
        if named is None:
            named = tuple(sublayer_ends(model, "pfeiffer"))
        return linear_targets(model, named, self.modules_to_save, why_not=_why_not)


class TokenShift(WeightDelta):
    """y = f(x) + (w · x + b) v, or without b where f has no bias."""

    def product(self, x: Tensor) -> Tensor:
        w, v, *b = (each.to(x.dtype) for each in self.trained())
        return F.linear(x, w[None], *b) * v  # (…, 1) · (out)

    def delta(self) -> Tensor:
        w, v, *_ = self.trained()
        return torch.outer(v, w)

    def folded_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight, _ = super().folded_into(weight, bias)
        _, v, *b = self.trained()
        return weight, bias + (b[0] * v).to(weight.dtype) if b and bias is not None else bias

    def touched(self) -> list[Tensor]:
        return LayerChange.touched(self)  # the bias as well

    def trace(self, layer: nn.Module, x: Any, tape: Any, kind: str) -> Any:
        """x is kept for w, and a number a token for v; beside a half-precision weight rounded v, and w for x."""
        if layer is not self.layer:
            return None
        n_in, n_out = sizes(layer)
        learns = tape.trains(*self.trained())
        length = tape.linear(x, 1, kind, weight=learns)
        if learns:
            tape.save(length, kind)
        if length.grad and self.trained()[0].element_size() != x.itemsize:
            for width in (n_out, n_in)[: 1 + x.grad]:
                tape.save(x.like(rows=1, width=width), kind)
        return x.like(width=n_out, grad=length.grad)


def _drawn(layer: nn.Module, generator: torch.Generator) -> dict[str, nn.Parameter]:
    """w and b uniform in ± 1 / √in, and v of zeros."""
    n_in, n_out = sizes(layer)
    bound, made = 1 / math.sqrt(n_in), {"w": n_in, "v": n_out} | ({"b": 1} if _has_bias(layer) else {})
    drawn = {key: torch.zeros(size, device="cpu") for key, size in made.items()}
    for key in made:
        if key != "v":
            drawn[key].uniform_(-bound, bound, generator=generator)
    return {f"adapterbias_{key}": nn.Parameter(value) for key, value in drawn.items()}


def _has_bias(layer: nn.Module) -> bool:
    return getattr(layer, "bias", None) is not None


def _why_not(layer: nn.Module) -> str | None:
    return "its input is words" if isinstance(layer, nn.Embedding) else why_not_linear(layer)
