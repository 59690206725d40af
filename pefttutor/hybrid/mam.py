"""MAM (mix and match): a prefix for the attention, and beside each feed-forward a scaled adapter.

    K ← [P_K; K]      V ← [P_V; V]          h ← h + s · (σ(x W_dᵀ + b_d) W_uᵀ + b_u);  x: what the feed-forward reads

He et al. write prefixes, adapters and LoRA as one formula, a change Δh that is added to a hidden state, compare where
it acts and how, and put together what did best: few values for the attention, the rest for the feed-forward.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

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
from pefttutor.parts.bottleneck import ACTIVATIONS, width_of
from pefttutor.parts.freezing import fully_trained, train_fully
from pefttutor.parts.network import settle
from pefttutor.parts.prefix_settings import KEY, add_prefix, check_prefix, count_prefix
from pefttutor.parts.settings import check_choice, check_names, check_number, check_whole

__all__ = ["MAM"]

BEFORE = "MAM puts a prefix before a text's"


@dataclass(frozen=True, kw_only=True)
class MAM:
    """The mix-and-match adapter: `PrefixTuning`, and `Adapter(placement="parallel", scaling=s)`, trained together.

    softmax(q [P_K; K]ᵀ / √d_h) [P_V; V] in every attention,  h ← h + s · (σ(x W_dᵀ + b_d) W_uᵀ + b_u) beside every
    feed-forward

    >>> from pefttutor.models import load
    >>> method = MAM(num_virtual_tokens=4, bottleneck=16, prefix_projection=True)
    >>> model = method.attach(load("campus-nano")[0])
    >>> model = method.drop_projection(model)                                  # trained: the MLP isn't needed any more
    >>> MAM(num_virtual_tokens=4, bottleneck=16).count(load("campus-nano")[0]) == sum(
    ...     p.numel() for p in model.parameters() if p.requires_grad)
    True

    num_virtual_tokens: the prefix's length P. prefix_projection: whether an MLP makes it of a smaller table, as the
        authors do; encoder_hidden_size: that one's width m; None is d. They have 800 for summaries.
    bottleneck: the adapter's features in the middle. scaling: s. activation: σ: gelu, relu, silu or tanh.
    adapter_modules: the layers beside which adapters stand, and input_modules, for each, in the model's order, the
        layer whose input is read. None finds the ends of the feed-forwards in a trial, as `Adapter` does.
    modules_to_save: modules that train fully and are saved along, such as a new head ("score", "classifier").
    init_seed: fixes what is drawn, whatever the device.

    The defaults are the authors' for summaries; for GLUE they have P = 16, m = 16 and s = 2. W_u and b_u start at 0 and
    W_d as in a new linear layer (b_d, too, which the authors start at 0), so the adapters do nothing at first; a prefix
    is never the identity. Of an encoder-decoder, the decoder's own attention gets one, where the authors give one to
    each of the three kinds.

    Shapes: prefix (P, 2 · L · n · d_h), as in `PrefixTuning`; W_d (m, d), b_d (m), W_u (d, m), b_u (d).
    Cost: it trains P · 2 L n d_h values, or the table's and the MLP's until that is dropped, and 2·m·d + m + d a block
        (`count`). Attention has P keys more, and a token takes 4·m·d FLOPs more a block; it can't be merged.
    Raises: ValueError for a model that takes no prefix, a name that finds nothing, a bottleneck above the width, or a
        model whose sublayers aren't found.
    Source: He et al. 2022, arXiv:2110.04366, section 4.6 and table 6.
    """

    num_virtual_tokens: int = 30
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    bottleneck: int = 512
    scaling: float = 4.0
    activation: str = "relu"
    adapter_modules: str | Collection[str] | None = None
    input_modules: str | Collection[str] | None = None
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_prefix(self)
        check_whole(self, "bottleneck")
        check_number(self, "scaling", above=0)
        check_choice(self, "prefix_projection", (True, False))
        check_choice(self, "activation", tuple(ACTIVATIONS))
        check_names(self, "adapter_modules", "input_modules", "modules_to_save")
        check_beside(self)

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, put the prefix and the adapters in, and return it.

        Raises: ValueError if the name is in use, or the model can't take both. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            fully = train_fully(model, (), self.modules_to_save)
            add_prefix(new, model, BEFORE)
            places, generator = self._places(model), torch.Generator().manual_seed(self.init_seed)
            how = {"activation": self.activation, "scaling": self.scaling}
            add_bottlenecks(new, model, places, self.bottleneck, generator, **how)
            for part in fully:
                new.add(part)
        return model

    def drop_projection(self, model: nn.Module, *, name: str | None = None) -> nn.Module:
        """After training: keep the prefix that the MLP makes in its place. The model says what it said.

        name: the attachment's, where there are several. Raises: ValueError if it has no MLP.
        """
        return settle(model, name, KEY, lambda method: replace(method, prefix_projection=False))

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: the prefix, or table and MLP, the adapters, and modules_to_save."""
        fully, _ = fully_trained(model, self.modules_to_save)
        prefix, m = count_prefix(model, self, BEFORE), self.bottleneck
        widths = [width_of(layer) for layer, _ in self._places(model).values()]
        own = prefix + sum(2 * m * d + m + d for d in widths)
        return own + sum(model.get_parameter(name).numel() for name in fully)

    def _places(self, model: nn.Module) -> Places:
        named, read, saved = self.adapter_modules, self.input_modules, self.modules_to_save
        places = parallel_places(model, named, read, saved, field="adapter_modules")
        check_narrow({path: layer for path, (layer, _) in places.items()}, self.bottleneck)
        return places
