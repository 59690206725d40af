"""UniPELT: an adapter, LoRA and a prefix in every block, each behind a gate that learns where it helps.

    g = mean σ(w · x + b) over a text's tokens

    h ← h + g_A · (σ(h W_dᵀ + b_d) W_uᵀ + b_u)      y = W x + g_L · B A x      K ← [g_P P_K; K],  V ← [g_P P_V; V]

Which kind of change helps differs from task to task and from block to block; the gates choose, text by text.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import nn

from pefttutor.method import DEFAULT, Attachment, attaching
from pefttutor.parts.adapter_places import adapter_places, check_narrow
from pefttutor.parts.attachment import added_key
from pefttutor.parts.blocks import blocks
from pefttutor.parts.bottleneck import ACTIVATIONS, draw_projections, width_of
from pefttutor.parts.cached_attention import form_of
from pefttutor.parts.freezing import fully_trained, train_fully
from pefttutor.parts.gates import GatedBottleneck, GatedLowRank, PrefixGate, PrefixGates, Tokens, drawn_gate
from pefttutor.parts.linear import sizes
from pefttutor.parts.lowrank_layer import draw_factors
from pefttutor.parts.modules import linear_targets
from pefttutor.parts.network import settle
from pefttutor.parts.prefix_settings import KEY, add_prefix, check_prefix, count_prefix
from pefttutor.parts.settings import check_choice, check_names, check_whole
from pefttutor.parts.streams import Hooked, reader, token_table
from pefttutor.parts.weight_delta import beside

__all__ = ["UniPELT"]

BEFORE = "UniPELT puts a prefix before a text's"


@dataclass(frozen=True, kw_only=True)
class UniPELT:
    """A bottleneck adapter after each feed-forward, LoRA on the attention and a prefix, each with a gate a layer.

    h ← h + g_A A(h),  y = W x + g_L B A x,  K ← [g_P P_K; K], V ← [g_P P_V; V];  g = mean σ(w · x + b)

    >>> model = nn.ModuleDict({"q_proj": nn.Linear(24, 24), "down_proj": nn.Linear(40, 24)})
    >>> method = UniPELT(num_virtual_tokens=0, bottleneck=5, adapter_modules=("down_proj",), r=2,
    ...                  lora_modules=("q_proj",))
    >>> method.count(model)                                       # 2·5·24 + 5 + 24;  2·(24 + 24);  two gates of 24 + 1
    415

    num_virtual_tokens: the prefix's length; 0 leaves it out, for models that take none. prefix_projection,
        encoder_hidden_size: as in `PrefixTuning`; the authors have an MLP of width 512.
    bottleneck: the adapter's features in the middle; the authors have d / 16. activation: gelu, relu, silu or tanh.
    adapter_modules: the layers whose output is adapted. None finds the ends of the feed-forwards in a trial. A norm
        may be named, as in `Adapter`.
    r: LoRA's rank. lora_modules: the layers that it changes. Its gate stands in the place of lora_alpha / r.
    gate: "text", the mean over a text's tokens, as the authors; "token" gives each token a gate of its own.
    modules_to_save: modules that train fully and are saved along, such as a new head ("score", "classifier").
    init_seed: fixes what is drawn, whatever the device.

    A mean over a text would show a model that writes, token after token, what comes later. So such a model takes
    gate="token", and no prefix, whose keys are the same for all tokens. Padding is left out of the mean, which the
    authors' code counts in. Each gate reads what its change reads, the prefix's what the attention reads. At the start
    the gates are about half open, adapters and LoRA add nothing, and a prefix isn't the identity, whatever its gate:
    with g = 0 its keys and values are zeros and still take their share of the attention.

    Shapes: A (r, in), B (out, r), W_d (m, d), W_u (d, m), prefix as in `PrefixTuning`; each gate w (in or d), b (1).
    Cost: it trains r·(in + out) + in + 1 values a layer of LoRA, 2·m·d + m + 2·d + 1 an adapter, the prefix's, and
        d + 1 an attention (`count`); FLOPs as the three parts have them, and it can't be merged.
    Raises: ValueError for a name that finds nothing, sizes beyond a layer's, a model that takes no prefix, or one that
        writes with gate="text".
    Source: Mao et al. 2022, arXiv:2110.07577, section 3.
    """

    num_virtual_tokens: int = 10
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    bottleneck: int = 48
    activation: str = "relu"
    adapter_modules: str | Collection[str] | None = None
    r: int = 8
    lora_modules: str | Collection[str] = ("q_proj", "v_proj")
    gate: str = "text"
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_prefix(self, least=0)
        check_choice(self, "prefix_projection", (True, False))
        check_whole(self, "bottleneck")
        check_choice(self, "activation", tuple(ACTIVATIONS))
        check_whole(self, "r")
        check_choice(self, "gate", ("text", "token"))
        check_names(self, "adapter_modules", "lora_modules", "modules_to_save")
        if self.num_virtual_tokens and self.gate == "token":
            raise ValueError(
                "gate is 'token', and a prefix has the same keys for all tokens of a text: leave it out, "
                "num_virtual_tokens=0, or let gate be 'text'."
            )

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, put the three and their gates in, and return it.

        Raises: ValueError if the name is in use, or the model can't take all of it. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            fully = train_fully(model, (), self.modules_to_save)
            generator = torch.Generator().manual_seed(self.init_seed)
            tokens = self._tokens(new, model)
            self._add_prefix(new, model, tokens, generator)
            for path, layer in self._adapted(model).items():
                drawn = draw_projections(width_of(layer), self.bottleneck, generator)
                drawn |= drawn_gate("adapter", width_of(layer), generator)
                new.add(GatedBottleneck(path, layer, name, drawn, activation=self.activation, tokens=tokens))
            for path, layer in self._changed(model).items():
                factors = draw_factors(layer, self.r, generator)
                gate = drawn_gate("lora", sizes(layer)[0], generator)
                new.add(GatedLowRank(path, layer, name, factors, scaling=1.0, gate=gate, tokens=tokens))
            for part in fully:
                new.add(part)
        return model

    def drop_projection(self, model: nn.Module, *, name: str | None = None) -> nn.Module:
        """After training: keep the prefix that the MLP makes in its place. The model says what it said.

        name: the attachment's, where there are several. Raises: ValueError if it has no MLP.
        """
        return settle(model, name, KEY, lambda method: replace(method, prefix_projection=False))

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: the three, their gates, and modules_to_save."""
        fully, _ = fully_trained(model, self.modules_to_save)
        own, m = self._count_prefix(model), self.bottleneck
        own += sum((2 * m + 2) * width_of(layer) + m + 1 for layer in self._adapted(model).values())
        for n_in, n_out in map(sizes, self._changed(model).values()):
            own += self.r * (n_in + n_out) + n_in + 1
        return own + sum(model.get_parameter(name).numel() for name in fully)

    def _adapted(self, model: nn.Module) -> dict[str, nn.Module]:
        named, saved = self.adapter_modules, self.modules_to_save
        layers = adapter_places(model, "pfeiffer", named, saved, field="adapter_modules")
        check_narrow(layers, self.bottleneck)
        return layers

    def _changed(self, model: nn.Module) -> dict[str, nn.Module]:
        layers = linear_targets(model, self.lora_modules, self.modules_to_save, field="lora_modules")
        if both := [path for path in layers if path in self._adapted(model)]:
            raise ValueError(
                f"lora_modules: {both[0]!r} has the adapter already; name other layers for LoRA."
            )
        for path, layer in layers.items():
            if isinstance(layer, nn.Embedding):
                raise ValueError(
                    f"lora_modules: {path!r} reads words, of which there is no gate; name linear layers."
                )
            if self.r > min(sizes(layer)):
                n_in, n_out = sizes(layer)
                raise ValueError(
                    f"r is {self.r}, but {path!r} maps {n_in} to {n_out}: it must be at most {min(n_in, n_out)}."
                )
        return layers

    def _tokens(self, new: Attachment, model: nn.Module) -> Tokens:
        """What says which tokens a gate is the mean of; it listens to a model that reads a text."""
        tokens = Tokens(alone=self.gate == "token")
        if tokens.alone:
            return tokens
        if getattr(model, "can_generate", bool)():
            raise ValueError(
                f"UniPELT's gates are means over all tokens of a text, and a {type(model).__name__} writes from left "
                "to right: it would see what comes later. Give each token its own gate, gate='token', and leave the "
                "prefix out, num_virtual_tokens=0."
            )
        if getattr(model, "main_input_name", None) == "input_ids":
            token_table(model, "UniPELT's gates are means over a text's")
            new.add(Hooked([(reader(model)[0], tokens.note)]))
        return tokens

    def _add_prefix(
        self, new: Attachment, model: nn.Module, tokens: Tokens, generator: torch.Generator
    ) -> None:
        if not self.num_virtual_tokens:
            return
        gates: dict[int, PrefixGate] = {}
        form, width = add_prefix(new, model, BEFORE, gates=gates), reader(model)[1]
        # A model without values doesn't show which modules its attentions are.
        hosts = form.attention or tuple(blocks(model)[1])
        names = {module: path for path, module in model.named_modules()}
        held = []
        for index, host in zip(form.layers, hosts, strict=True):
            gates[index] = PrefixGate(new.name, tokens)
            for key, value in beside(host, drawn_gate("prefix", width, generator)).items():
                held.append((host, names[host], added_key(key, new.name), value))
        new.add(PrefixGates(held))
        new.add(Hooked([(host, gates[i].note) for i, host in zip(form.layers, hosts, strict=True)]))

    def _count_prefix(self, model: nn.Module) -> int:
        if not self.num_virtual_tokens:
            return 0
        form = form_of(model, BEFORE)
        return count_prefix(model, self, BEFORE) + len(form.layers) * (reader(model)[1] + 1)
