"""AdapterFusion: let every token choose, layer by layer, among adapters that were trained for other tasks.

    s = softmaxₙ((Q h + b) · K zₙ)        h ← h + V Σₙ sₙ zₙ        zₙ = Aₙ(h), what the n-th adapter adds

First each adapter learns its own task; then they are frozen, and Q, K and V learn the target task.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.kernels.fusion_attention import fusion_attention
from pefttutor.kernels.precision import unrounded
from pefttutor.method import DEFAULT, Attachment, attached, attaching, find, learning
from pefttutor.parts.attachment import added_key
from pefttutor.parts.bottleneck import Bottleneck
from pefttutor.parts.freezing import fully_trained, train_fully
from pefttutor.parts.layer_change import Compute, LayerChange
from pefttutor.parts.network import Made
from pefttutor.parts.settings import check_names, check_number, check_whole
from pefttutor.parts.weight_delta import WeightDelta

__all__ = ["AdapterFusion"]


@dataclass(frozen=True, kw_only=True)
class AdapterFusion:
    """Attention over several bottleneck adapters that the model carries already.

        model = Adapter(placement="pfeiffer").attach(model, name="a")      # train it on one task, then
        model = Adapter(placement="pfeiffer").attach(model, name="b")      # this one, alone, on another
        model = AdapterFusion(adapters=("a", "b")).attach(model)           # and now Q, K and V on a third

    h ← h + V Σₙ sₙ zₙ,  s = softmaxₙ((Q h + b) · K zₙ),  zₙ = Aₙ(h) without its residual;  no 1/√d

    >>> from pefttutor import Adapter
    >>> model = nn.ModuleDict({"down_proj": nn.Linear(40, 24)})
    >>> for name in ("a", "b"):
    ...     model = Adapter(bottleneck=5, target_modules=("down_proj",)).attach(model, name=name)
    >>> AdapterFusion(adapters=("a", "b")).count(model)                    # 3 · 24² + 24
    1752

    adapters: the names of the attachments to choose from. They must stand at the same layers, and read what these
        layers give. Fused they are frozen and switched off: they act through the fusion alone, and may be switched on
        again in its place. A head that one of them has trained stays out of it.
    modules_to_save: modules that train fully and are saved along, such as the target task's head ("classifier").
    regularization_weight: the loss gets that times Σ (V − I)², over all layers.
    init_seed: fixes the random Q and K, whatever the device.

    V starts at I, Q and K are drawn from N(0, 0.02²), and b is 0. Scores grow with the lengths of h and z. Where these
    are small, all adapters count nearly the same at first; where they aren't, as in campus-nano (lesson 06), the draw
    of Q and K gives nearly all of a token to one adapter. With one adapter s = 1, and the model is that adapter's,
    exactly. As K is linear, (Q h + b) · K z = Kᵀ(Q h + b) · z, and V is applied to the sum: three products with d × d
    matrices a token, whatever the number of adapters.

    The authors' library gives K a bias as well. It adds the same number to all scores of a token, so the softmax
    doesn't see it and its gradient is zero: it is left out, d values a layer.

    Shapes: Q, K, V (d, d), b (d).
    Cost: it trains 3·d² + d values a layer (`count`), which for BERT-base are 19 % of the model, and takes 6·d² FLOPs
        more a token beside all the adapters'; it can't be merged.
    Raises: ValueError for a name that isn't there, for what isn't a bottleneck adapter, is a parallel one, or trains
        norms, and for adapters at different layers.
    Source: Pfeiffer et al. 2021, arXiv:2005.00247, section 3.2; chapter eq. 4.2. The regularisation is that of the
        library.
    """

    adapters: Collection[str] = ()
    modules_to_save: Collection[str] = ()
    regularization_weight: float = 0.01
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_names(self, "adapters", "modules_to_save")
        check_number(self, "regularization_weight", least=0)
        check_whole(self, "init_seed", least=0)
        twice = [name for name in self.adapters if list(self.adapters).count(name) > 1]
        if twice:
            raise ValueError(f"adapters names {twice[0]!r} twice; each can be fused once.")

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model` with its adapters, put Q, K and V at each of their layers, and return it.

        Raises: ValueError if the name is in use, or these adapters can't be fused. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            new.reads = tuple(self.adapters)
            fully = train_fully(model, (), self.modules_to_save)
            generator = torch.Generator().manual_seed(self.init_seed)
            for path, adapter in self._places(model).items():
                new.add(Fused(path, adapter, name, self.adapters, generator))
            for part in fully:
                new.add(part)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, on a model that carries the adapters: Σ (3·d² + d), and modules_to_save."""
        widths = [adapter.width for adapter in self._places(model).values()]
        fully, _ = fully_trained(model, self.modules_to_save)
        return sum(3 * d * d + d for d in widths) + sum(model.get_parameter(name).numel() for name in fully)

    def penalty(self, model: nn.Module) -> Tensor:
        """What is added to the loss to keep V near I, so that an adapter's output keeps its meaning."""
        parts = [part for a in learning(model, self) for part in a.parts if isinstance(part, Fused)]
        if not parts or not self.regularization_weight:
            return torch.zeros((), requires_grad=True)
        terms = [_distance_from_identity(part.trained()[-1]) for part in parts]
        return self.regularization_weight * torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def _places(self, model: nn.Module) -> dict[str, Bottleneck]:
        """The first of the adapters at each layer, by the layer's name."""
        if not self.adapters:
            names = tuple(n for n, a in attached(model).items() if _bottlenecks(a))
            raise ValueError(
                f"adapters is empty; name those to fuse, attached before. This model carries {names or 'none'}."
            )
        found: dict[str, dict[str, Bottleneck]] = {}
        for name in self.adapters:
            attachment = find(model, name)
            _check_fusable(model, attachment)
            found[name] = _bottlenecks(attachment)
        first, *others = self.adapters
        for name in others:
            apart = sorted(found[first].keys() ^ found[name].keys())
            if apart:
                raise ValueError(
                    f"{first!r} and {name!r} stand at different layers: only one of them is at {apart[0]!r} "
                    f"({len(apart)} such layers). Fuse adapters of one placement."
                )
        return found[first]


class Fused(LayerChange):
    """The adapters of one layer, with attention over them in the place of each one's own sum.

    y = f(x) + V Σₙ sₙ Aₙ(f(x)), or at a norm N, where z is the residual sum, y = N(z + V Σₙ sₙ Aₙ(N(z))).
    """

    def __init__(
        self, path: str, first: Bottleneck, name: str, adapters: Collection[str], generator: torch.Generator
    ) -> None:
        """`first`: one of the adapters, which is of the width and the dtype of all."""
        self.adapters, self.at_norm = tuple(adapters), first.at_norm
        d, like = first.width, first.trained()[0]
        query, key = (torch.empty(d, d, device="cpu").normal_(0, 0.02, generator=generator) for _ in range(2))
        start = {"query": query, "query_bias": torch.zeros(d), "key": key, "value": torch.eye(d)}
        added = {added_key(f"fusion_{k}", name): nn.Parameter(value.to(like)) for k, value in start.items()}
        super().__init__(path, first.layer, name, added)

    def describe(self) -> str:
        return f"{self.name}: fuses {', '.join(self.adapters)}"

    def fused(self, h: Tensor) -> Tensor:
        """V Σₙ sₙ zₙ with s = softmaxₙ(Kᵀ(Q h + b) · zₙ). Shapes: (…, d) → (…, d)."""
        changes = vars(self.layer)["_changes"]
        z = torch.stack([changes[name].branch(h) for name in self.adapters], -2)  # (…, N, d)
        return fusion_attention(h, z, *(parameter.to(h.dtype) for parameter in self.trained()))

    def forward(self, inner: Compute, own: bool, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = inner(x, *args, **kwargs)
        if self.at_norm:
            return inner(x + self.fused(y).to(x.dtype), *args, **kwargs)
        return y + self.fused(y).to(y.dtype)

    def check_foldable(self) -> None:
        raise ValueError("fused adapters have nonlinearities, which no weight can hold; leave it attached.")

    def folded_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise ValueError(
            f"{self.path!r} has the fusion {self.name!r} of adapters, whose nonlinearities no weight can hold, and "
            "what comes after it builds on that weight, as DoRA does: attach that one first, or switch the fusion off."
        )


def _distance_from_identity(value: Tensor) -> Tensor:
    """Σ (V − I)², as precise as V, also under autocast."""
    with unrounded(value):
        return (value - torch.eye(len(value), device=value.device, dtype=value.dtype)).square().sum()


def _bottlenecks(attachment: Attachment) -> dict[str, Bottleneck]:
    """The attachment's adapters by the name of their layer."""
    return {part.path: part for part in attachment.parts if isinstance(part, Bottleneck)}


def _check_fusable(model: nn.Module, attachment: Attachment) -> None:
    """Raise ValueError, with the reason, if an attachment can't be fused."""
    who = f"{attachment.name!r} ({type(attachment.method).__name__})"
    found = _bottlenecks(attachment)
    if not found:
        raise ValueError(
            f"{who} has no bottleneck adapter, and AdapterFusion chooses among these: Adapter(…)."
        )
    if others := [part for part in attachment.parts if isinstance(part, (WeightDelta, Made))]:
        raise ValueError(
            f"{who} has more than adapters, a {type(others[0]).__name__}, and AdapterFusion would leave that out: fuse "
            "adapters alone, Adapter(…)."
        )
    if any(part.source is not None for part in found.values()):
        raise ValueError(
            f"{who} stands beside its sublayers, and what it adds doesn't follow from what they give: fuse serial "
            "adapters, placement='houlsby' or 'pfeiffer', or at a norm."
        )
    heads = {name for names in fully_trained(model, attachment.method.modules_to_save) for name in names}
    changed = [key for part in attachment.parts for key, _ in part.named_in_place() if key not in heads]
    if changed:
        raise ValueError(
            f"{who} has trained {changed[0]!r} of the base with it ({len(changed)} such tensors), which several "
            "adapters can't share: fuse adapters without train_norms."
        )
