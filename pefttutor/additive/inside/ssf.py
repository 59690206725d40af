"""SSF: learn to scale and shift what every layer gives.

    y ← γ ⊙ y + β          after every linear layer, norm and convolution;  γ starts at 1 and β at 0

Afterwards both go into the layers' own weights: W ← γ ⊙ W and b ← γ ⊙ b + β.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.attachment import added_key
from pefttutor.parts.called import read_past
from pefttutor.parts.freezing import fully_trained, train_fully
from pefttutor.parts.layer_change import Compute, LayerChange
from pefttutor.parts.linear import own_class, sizes, why_not_linear
from pefttutor.parts.modules import check_called_in_evaluation, find_modules, linear_targets
from pefttutor.parts.norms import is_norm
from pefttutor.parts.settings import check_names, check_number, check_whole

__all__ = ["SSF"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, kw_only=True)
class SSF:
    """Scaling and shifting your features: a scale γ and a shift β for each feature that a layer gives.

    y = γ ⊙ f(x) + β

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 2), nn.Flatten(), nn.Linear(8, 6, bias=False), nn.LayerNorm(6))
    >>> SSF().count(model)                               # 2 · 8, 6 without a bias, and 2 · 6
    34

    target_modules: the layers whose output is scaled and shifted. None takes every linear layer but the output head,
        every norm that scales its features, and every convolution.
    modules_to_save: modules that train fully and are saved along, such as a new head ("classifier").
    init_std: 0 starts γ at 1 and β at 0, so that the model starts as it was, exactly. The authors' code draws them from
        N(1, 0.02²) and N(0, 0.02²): 0.02.
    init_seed: fixes what is drawn, whatever the device.

    A layer without a bias gets no β: nothing of it could hold the shift, so the merged model would be of another form.
    Left out are also norms whose weight isn't the scale of their last dimension, such as Gemma's, which multiplies by
    1 + w, or over channels, such as nn.GroupNorm, and convolutions that a cache replaces (RecurrentGemma's).

    Shapes: γ, β (out), of a convolution (channels).
    Cost: it trains 2·out values a layer (`count`), of ViT-B/16 0.24 %, and takes one product and one sum more a
        feature; none once merged.
    Raises: ValueError for a name that finds nothing, or a layer that can't be scaled.
    Source: Lian et al. 2022, arXiv:2210.08823, eq. 3 and 5.
    """

    target_modules: str | Collection[str] | None = None
    modules_to_save: Collection[str] = ()
    init_std: float = 0.0
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_names(self, "target_modules", "modules_to_save")
        check_number(self, "init_std", least=0)
        check_whole(self, "init_seed", least=0)

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, give its layers their scales and shifts, and return it.

        Raises: ValueError if the name is in use or a layer can't be scaled. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            fully = train_fully(model, (), self.modules_to_save)
            generator = torch.Generator().manual_seed(self.init_seed)
            for path, layer in self._targets(model).items():
                new.add(Shifted(path, layer, name, self.init_std, generator))
            for part in fully:
                new.add(part)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: Σ 2·out, or out where there is no bias, and modules_to_save."""
        scales = sum(_width(layer) * (1 + _has_bias(layer)) for layer in self._targets(model).values())
        fully, _ = fully_trained(model, self.modules_to_save)
        return scales + sum(model.get_parameter(name).numel() for name in fully)

    def _targets(self, model: nn.Module) -> dict[str, nn.Module]:
        writes: Any = getattr(model, "can_generate", bool)()

        def why_not(layer: nn.Module) -> str | None:
            if writes and isinstance(layer, nn.Conv1d) and layer.groups == layer.in_channels > 1:
                return "a text that goes on from a cache reads its weight without calling it"
            return _why_not(layer)

        if self.target_modules is not None:
            return linear_targets(model, self.target_modules, self.modules_to_save, why_not=why_not)
        saved = (
            find_modules(model, self.modules_to_save, field="modules_to_save") if self.modules_to_save else {}
        )
        get: Any = getattr(model, "get_output_embeddings", None)
        without = {
            get() if callable(get) else None,
            *(m for module in saved.values() for m in module.modules()),
        }
        found = {n: m for n, m in model.named_modules() if n and m not in without and why_not(m) is None}
        check_called_in_evaluation(model, found, "target_modules")
        past = read_past(model, [m.weight for m in found.values() if isinstance(m.weight, Tensor)])
        return {name: layer for name, layer in found.items() if id(layer.weight) not in past}


class Shifted(LayerChange):
    """A layer f whose output is scaled and shifted: y = γ ⊙ f(x) + β, or y = γ ⊙ f(x) where f has no bias."""

    def __init__(
        self, path: str, layer: nn.Module, name: str, std: float, generator: torch.Generator
    ) -> None:
        self.after = (
            layer.weight.dim() - 2 if isinstance(layer, CONVOLUTIONS) else 0
        )  # dimensions behind the channels
        weight: Any = next(iter(layer.parameters()), next(iter(layer.buffers()), torch.zeros(())))
        # At least float32, also next to a half-precision weight: small steps from 1 would be rounded away otherwise.
        given = weight.dtype if weight.is_floating_point() else torch.float32
        dtype, added = torch.promote_types(given, torch.float32), {}
        for key, mean in (("ssf_scale", 1.0), ("ssf_shift", 0.0))[: 1 + _has_bias(layer)]:
            drawn = torch.empty(_width(layer), device="cpu").fill_(mean)
            if std:
                drawn.normal_(mean, std, generator=generator)
            added[added_key(key, name)] = nn.Parameter(drawn.to(weight.device, dtype))
        super().__init__(path, layer, name, added)
        self.odd = None  # `_why_not` has seen that the weight is a scale, also of what isn't linear

    def describe(self) -> str:
        return f"{self.name}: scales{' and shifts' if len(self.added_keys) > 1 else ''}, merged={self.folded}"

    def forward(self, inner: Compute, own: bool, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = inner(x, *args, **kwargs)
        scale, *shift = (p.to(y.dtype).view(-1, *[1] * self.after) for p in self.trained())
        return y * scale + shift[0] if shift else y * scale

    def folded_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale, *shift = (p.to(weight.dtype) for p in self.trained())
        scaled = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        return scaled, None if bias is None else bias * scale + (shift[0] if shift else 0)


def _width(layer: Any) -> int:
    """How many features a layer gives, or channels."""
    if isinstance(layer, CONVOLUTIONS):
        return layer.out_channels
    return layer.weight.numel() if is_norm(layer) else sizes(layer)[1]


def _has_bias(layer: nn.Module) -> bool:
    return getattr(layer, "bias", None) is not None


def _why_not(layer: nn.Module) -> str | None:
    """Why a layer's output can't be scaled by its weight, or None."""
    kind, weight = type(layer).__name__, layer._parameters.get("weight")
    if "forward" in vars(layer):
        return why_not_linear(layer)
    if isinstance(layer, nn.Embedding):
        return "it is an Embedding, whose rows are words"
    if isinstance(layer, CONVOLUTIONS):
        return None if weight is not None else f"it is a {kind} that computes its weight from other tensors"
    if not is_norm(layer):
        return why_not_linear(layer)
    return (
        None
        if _is_scale(layer, weight)
        else f"it is a {kind}, whose weight isn't the scale of its last dimension"
    )


@torch.no_grad()
def _is_scale(layer: nn.Module, weight: Any) -> bool:
    """Whether a norm gives twice as much with twice the weight and the bias, seen on a few rows."""
    if weight is None or weight.is_meta:
        return weight is not None
    kind: Any = own_class(layer)  # what attached methods have changed isn't asked, as in `why_not_linear`
    doubled = {k: 2 * p for k, p in layer._parameters.items() if k in ("weight", "bias") and p is not None}
    twice = kind.__new__(kind)
    vars(twice).update(vars(layer), _parameters=layer._parameters | doubled)
    rows, d = 3 + (weight.numel() == 3), weight.numel()  # never as many as features: a GroupNorm's lie there
    x = torch.linspace(-1, 1, rows * d, device=weight.device).view(1, rows, d).cos().to(weight.dtype)
    try:
        return torch.allclose(kind.forward(twice, x), 2 * kind.forward(layer, x), rtol=1e-2, atol=1e-2)
    except Exception:  # whatever a norm raises here means: its features aren't the last dimension
        return False
