"""CIAT, counter-interference adapters: a bottleneck over the embeddings, and one beside every sublayer.

    x ← x + W_u ReLU(W_d LN(x) + b_d) + b_u        before the first block
    h ← h + W_u ReLU(W_d n + b_d) + b_u            n: what the attention or the feed-forward reads, h: what it gives

It was made for one translator of many languages, whose languages get in each other's way: each gets its own.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.adapter_places import (
    Places,
    add_bottlenecks,
    check_beside,
    check_narrow,
    parallel_places,
)
from pefttutor.parts.bottleneck import ACTIVATIONS, draw_projections, width_of
from pefttutor.parts.embedding_bottleneck import EmbeddingBottleneck
from pefttutor.parts.entrance import Entrance, entrance
from pefttutor.parts.freezing import fully_trained, train_fully
from pefttutor.parts.settings import check_choice, check_names, check_number, check_whole
from pefttutor.parts.streams import Hooked
from pefttutor.parts.sublayers import sublayers

__all__ = ["CIAT"]

WHAT = "CIAT changes what goes in for a text's"


@dataclass(frozen=True, kw_only=True)
class CIAT:
    """Counter-interference adapters: over the embeddings, beside every self-attention, and beside every feed-forward.

    x ← x + W_u ReLU(W_d LN(x) + b_d) + b_u,  h ← h + W_u σ(W_d n + b_d) + b_u

    >>> from pefttutor.models import load
    >>> model, _ = load("campus-nano")
    >>> CIAT(bottleneck=16, embedding_bottleneck=8).count(model)      # 8 · (2·16·128 + 16 + 128) + 2·8·128 + 8 + 3·128
    36360

    bottleneck: the features in the middle beside a sublayer; None for half of the width, as in the authors' code.
    embedding_bottleneck: those over the embeddings; None likewise. activation: σ: gelu, relu, silu or tanh; over the
        embeddings it is the ReLU.
    adapter_modules: the layers beside which adapters stand, and input_modules, for each, in the model's order, the
        layer whose input is read. None finds the sublayers in a trial; a decoder's attention to an encoder gets none.
    modules_to_save: modules that train fully and are saved along, such as a new head ("classifier").
    init_std: None starts W_d and b_d as in a new linear layer and W_u and b_u at 0, so that the model starts as it
        was, exactly; a number draws all W from a normal within ± 2 std. init_seed: fixes them, whatever the device.

    The authors drop out some of what stands in the middle, and stop the base's own dropout; here neither is changed.
    They read a sublayer's input behind its norm, where there is one before it, and so does this. An encoder and a
    decoder have one bottleneck each over their embeddings, with the positions added where the blocks get them so.

    Shapes: W_d (m, d), b_d (m), W_u (d, m), b_u (d); LN's scale and shift (d), in the first block.
    Cost: it trains 2·m·d + m + d values a sublayer, and 2·m·d + m + 3·d a stack of blocks (`count`); a token takes
        4·m·d FLOPs more for each. It can't be merged. Finding the places takes two passes of three tokens.
    Raises: ValueError for a model that reads no tokens, a name that finds nothing, a bottleneck above the width, blocks
        that a text passes more than once, or a model whose sublayers aren't found.
    Source: Zhu et al. 2021, arXiv:2104.08154, by the authors' code in neurst; chapter section 4.2.
    """

    bottleneck: int | None = None
    embedding_bottleneck: int | None = None
    activation: str = "relu"
    adapter_modules: str | Collection[str] | None = None
    input_modules: str | Collection[str] | None = None
    modules_to_save: Collection[str] = ()
    init_std: float | None = None
    init_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("bottleneck", "embedding_bottleneck"):
            if getattr(self, name) is not None:
                check_whole(self, name)
        check_choice(self, "activation", tuple(ACTIVATIONS))
        if self.init_std is not None:
            check_number(self, "init_std", above=0)
        check_whole(self, "init_seed", least=0)
        check_names(self, "adapter_modules", "input_modules", "modules_to_save")
        check_beside(self)

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, put the adapters in, and return it.

        Raises: ValueError if the name is in use, or the model can't have them. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            fully = train_fully(model, (), self.modules_to_save)
            found, places = self._found(model)
            generator = torch.Generator().manual_seed(self.init_seed)
            drawn = {
                path: draw_projections(width, self._over(width), generator, self.init_std)
                for path, width in found.widths.items()
            }
            over = EmbeddingBottleneck(found.firsts, name, drawn)
            new.add(over)
            new.add(Hooked([(block, over.enter) for block in found.firsts.values()]))
            for path, place in places.items():
                how = {"activation": self.activation, "std": self.init_std}
                add_bottlenecks(new, model, {path: place}, self._beside(place[0]), generator, **how)
            for part in fully:
                new.add(part)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: over the embeddings, beside sublayers, and modules_to_save."""
        found, places = self._found(model)
        over = sum(2 * self._over(d) * d + self._over(d) + 3 * d for d in found.widths.values())
        layers = [(self._beside(layer), width_of(layer)) for layer, _ in places.values()]
        fully, _ = fully_trained(model, self.modules_to_save)
        own = over + sum(2 * m * d + m + d for m, d in layers)
        return own + sum(model.get_parameter(name).numel() for name in fully)

    def _over(self, width: int) -> int:
        return self.embedding_bottleneck or max(1, width // 2)

    def _beside(self, layer: nn.Module) -> int:
        return self.bottleneck or max(1, width_of(layer) // 2)

    def _found(self, model: nn.Module) -> tuple[Entrance, Places]:
        """Where the blocks begin, and beside which layers adapters stand."""
        found, named, read = entrance(model, WHAT), self.adapter_modules, self.input_modules
        for path, width in found.widths.items():
            if self._over(width) > width:
                raise ValueError(
                    f"embedding_bottleneck is {self.embedding_bottleneck}, but {path!r} reads {width} features: it "
                    f"must be at most {width}."
                )
        if named is None:
            outer = [s for s in sublayers(model, "adapter_modules") if s.first or s.last]
            named, read = tuple(s.end for s in outer), tuple(s.start for s in outer)
        places = parallel_places(model, named, read, self.modules_to_save, field="adapter_modules")
        if self.bottleneck is not None:
            check_narrow({path: layer for path, (layer, _) in places.items()}, self.bottleneck)
        return found, places
