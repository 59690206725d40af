"""LLaMA-Adapter: in the upper layers every token also attends to a few learned prompts, through a gate that is closed
at the start.

    o = softmax(s · q kᵀ) v + g · softmax(s · q Kᵀ) V          K = P W_kᵀ, V = P W_vᵀ;  g = 0 at first

A prefix shares one softmax with the text and takes its part of the attention from it at once. Here the prompts have a
softmax of their own, whose sum is added to the text's: with g = 0 the model says what it said.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.attachment import added_key
from pefttutor.parts.bottleneck import width_of
from pefttutor.parts.freezing import fully_trained, train_fully
from pefttutor.parts.layer_change import Compute, LayerChange
from pefttutor.parts.linear import sizes
from pefttutor.parts.rotary_attention import Call, Heads, attentions, keys_and_values
from pefttutor.parts.settings import check_choice, check_names, check_whole
from pefttutor.parts.streams import Hooked
from pefttutor.parts.weight_delta import beside

__all__ = ["LLaMAAdapter"]


@dataclass(frozen=True, kw_only=True)
class LLaMAAdapter:
    """Adaption prompts with zero-initialised attention, in the attentions of a model like Llama.

    o_h ← o_h + g · softmax(s · q_h K_hᵀ) V_h   for every head h, before the layer W_o;  K = P W_kᵀ, V = P W_vᵀ

        model = LLaMAAdapter(adapter_len=10, adapter_layers=30).attach(model)      # the upper 30 of LLaMA-7B's 32

    adapter_len: how many prompts P a layer has. adapter_layers: how many layers from the top have some; None for all.
    gate: "layer" for one g a layer, as HF PEFT; "head" for tanh(g) with a g for each head, as the authors' code.
    modules_to_save: modules that train fully and are saved along, such as a new head ("score").
    init_seed: fixes the random prompts, whatever the device.

    Prompts pass the frozen W_k and W_v and have no position: K isn't rotated, while the queries are, as the model
    rotates them. They are in no cache. At the start g alone gets a gradient, since the prompts' is multiplied by g.

    That an attention uses its layers q_proj, k_proj, v_proj and o_proj as Llama does is seen in a trial. HF PEFT adds
    W_o's bias a second time, where there is one; here it is added once.

    Shapes: P (adapter_len, d), standard normal at first; g (1) or (heads), 0 at first.
    Cost: it trains adapter_len · d + 1 values a layer, or adapter_len · d + heads (`count`). A token takes
        4·adapter_len·heads·width FLOPs more a layer, and each call passes the prompts through W_k and W_v; it can't
        be merged.
    Raises: ValueError for a model without such attentions, or with fewer than adapter_layers.
    Source: Zhang et al. 2023, arXiv:2303.16199, section 3.
    """

    adapter_len: int = 10
    adapter_layers: int | None = None
    gate: str = "layer"
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_whole(self, "adapter_len")
        if self.adapter_layers is not None:
            check_whole(self, "adapter_layers")
        check_choice(self, "gate", ("layer", "head"))
        check_whole(self, "init_seed", least=0)
        check_names(self, "modules_to_save")

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, give its upper attentions prompts and gates, and return it.

        Raises: ValueError if the name is in use, or the model has no such attentions. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            fully = train_fully(model, (), self.modules_to_save)
            generator = torch.Generator().manual_seed(self.init_seed)
            for path, attention in self._places(model).items():
                prompt = torch.empty(self.adapter_len, sizes(attention.k_proj)[0], device="cpu")
                prompt.normal_(generator=generator)
                gate, call = torch.zeros(self._gates(attention), device="cpu"), Call()
                new.add(Attended(f"{path}.o_proj", attention, name, prompt, gate, call, self.gate))
                new.add(Hooked([(attention, call.enter)], after=[(attention.q_proj, call.note)]))
            for part in fully:
                new.add(part)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: prompts and gates, and modules_to_save."""
        fully, _ = fully_trained(model, self.modules_to_save)
        own = [self.adapter_len * sizes(a.k_proj)[0] + self._gates(a) for a in self._places(model).values()]
        return sum(own) + sum(model.get_parameter(name).numel() for name in fully)

    def _gates(self, attention: Any) -> int:
        return Heads.of(attention).queries if self.gate == "head" else 1

    def _places(self, model: nn.Module) -> dict[str, Any]:
        found = list(attentions(model, "LLaMAAdapter adds to").items())
        wanted = len(found) if self.adapter_layers is None else self.adapter_layers
        if wanted > len(found):
            raise ValueError(
                f"adapter_layers is {wanted}, and this model has {len(found)} layers with such an attention: give at "
                f"most {len(found)}, or None for all."
            )
        return dict(found[-wanted:])


class Attended(LayerChange):
    """The layer W_o after an attention: what the queries find among the prompts is added to what it reads."""

    on_what_is_read = True

    def __init__(
        self,
        path: str,
        attention: Any,
        name: str,
        prompt: Tensor,
        gate: Tensor,
        call: Call,
        kind: str,
    ) -> None:
        """`path`: of the attention's o_proj. `call`: what gets its queries. `kind`: of the gate."""
        self.heads, self.call, self.kind, layer = Heads.of(attention), call, kind, attention.o_proj
        self.norms = [getattr(attention, f"{which}_norm", None) for which in "qk"]
        drawn = {"adaption_prompt": nn.Parameter(prompt), "adaption_gate": nn.Parameter(gate)}
        super().__init__(path, layer, name, {added_key(k, name): p for k, p in beside(layer, drawn).items()})

    def describe(self) -> str:
        return f"{self.name}: {len(self.trained()[0])} prompts"

    def found(self) -> Tensor:
        """g · softmax(s · q Kᵀ) V. Shapes: → (batch, seq, heads · width)."""
        attention, q = self.call.take()
        prompt, gate = (each.to(q.dtype) for each in self.trained())
        more = self.heads.queries // self.heads.keys
        K, V = (
            x.transpose(0, 1).repeat_interleave(more, 0).to(q.dtype)
            for x in keys_and_values(attention, prompt)
        )  # (heads, adapter_len, width)
        scores = self.heads.scores(torch.bmm(q.flatten(0, 1).transpose(0, 1), K.mT))
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        gates = gate.tanh()[:, None, None] if self.kind == "head" else gate
        return torch.bmm(gates * weights, V).transpose(0, 1).reshape(*q.shape[:2], -1)

    def forward(self, inner: Compute, own: bool, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return inner(x + self.found().to(x.dtype), *args, **kwargs)

    def touched(self) -> list[Tensor]:
        return []

    def check_foldable(self) -> None:
        raise ValueError(
            "prompts in an attention depend on the queries, and no weight can hold that; leave it attached."
        )

    def trace(self, layer: nn.Module, x: Any, tape: Any, kind: str) -> Any:
        """The rotated queries, the softmax with and without its gate, the prompts' values, their keys for the queries,
        and what norms of both keep."""
        if layer is not self.layer:
            return None
        learns, count, q = tape.trains(*self.trained()), len(self.trained()[0]), x.like()
        k = x.like(rows=count, width=self.heads.keys * self.heads.width, grad=learns)
        for norm, read in zip(self.norms, (q, k), strict=True):
            if norm is not None:
                own = width_of(norm)
                tape.call(norm, read.view(rows=read.numel // own, width=own), kind)
        tape.kept.pop(q, None)  # what W_q gives: the attention's own norm keeps it as well
        weights = x.like(rows=x.rows * self.heads.queries, width=count)
        wide = weights.like(itemsize=max(4, x.itemsize))
        if x.grad or learns:
            tape.save(wide, kind)
        if learns:
            tape.save(x.like(), kind)
            for _ in range(1 + (x.itemsize < wide.itemsize)):
                tape.save(weights.like(), kind)
        for _ in range((x.grad or learns) + x.grad):
            tape.save(x.like(rows=count), kind)
        return x.like(width=sizes(layer)[1], grad=x.grad or learns)
