"""(IA)³: learn by how much each feature of keys, values and the feed-forward hidden layer is scaled.

k ← l_k ⊙ k        v ← l_v ⊙ v        W₂ (l_ff ⊙ h)          the scales l start at 1
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.attachment import added_key
from pefttutor.parts.freezing import fully_trained, train_fully
from pefttutor.parts.layer_change import Compute, LayerChange
from pefttutor.parts.linear import sizes
from pefttutor.parts.modules import find_modules, linear_targets
from pefttutor.parts.settings import check_names

__all__ = ["IA3"]


@dataclass(frozen=True, kw_only=True)
class IA3:
    """Infused Adapter by Inhibiting and Amplifying Inner Activations: one trained vector a layer.

    y = l ⊙ (W x + b)   on the output of a layer,      y = W (l ⊙ x) + b   on the input of one of `feedforward_modules`

    >>> model = nn.ModuleDict({"k_proj": nn.Linear(6, 4), "down_proj": nn.Linear(8, 6)})
    >>> IA3(target_modules=("k_proj", "down_proj")).count(model)          # 4 outputs and 8 inputs
    12

    target_modules: the linear layers that get a vector: keys, values, and the feed-forward layer's second.
    feedforward_modules: those of the targets whose input is scaled: the hidden layer's features, not the output's.
    modules_to_save: modules that train fully and are saved along, such as a new head ("score", "classifier").

    The scales start at 1, so the model starts as it was, exactly; afterwards they can be merged into rows of W and
    into b, or into columns of W. The bias of a layer is scaled with its output.

    Shapes: l (out), or (in) of a feed-forward module.
    Cost: it trains out (or in) values a layer (`count`) and takes one product more a feature, none once merged.
    Raises: ValueError for a name that finds nothing, or a feed-forward module that is no target.
    Source: Liu et al. 2022, arXiv:2205.05638, section 3.3.
    """

    target_modules: str | Collection[str] = ("k_proj", "v_proj", "down_proj")
    feedforward_modules: str | Collection[str] = ("down_proj",)
    modules_to_save: Collection[str] = ()

    def __post_init__(self) -> None:
        check_names(self, "target_modules", "feedforward_modules", "modules_to_save")

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, give its targets their scales, and return it.

        Raises: ValueError if the name is in use or a module can't be scaled. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            for path, (layer, on_input) in self._targets(model).items():
                new.add(Scaled(path, layer, name, on_input=on_input))
            for part in train_fully(model, (), self.modules_to_save):
                new.add(part)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: Σ out, or in where the input is scaled, and modules_to_save."""
        scales = sum(sizes(layer)[0 if on_input else 1] for layer, on_input in self._targets(model).values())
        fully, _ = fully_trained(model, self.modules_to_save)
        return scales + sum(model.get_parameter(name).numel() for name in fully)

    def _targets(self, model: nn.Module) -> dict[str, tuple[nn.Module, bool]]:
        """The target layers by name, each with whether its input is scaled."""
        targets = linear_targets(model, self.target_modules, self.modules_to_save)
        scaled_on_input: dict[str, nn.Module] = {}
        if self.feedforward_modules:
            scaled_on_input = find_modules(model, self.feedforward_modules, field="feedforward_modules")
        outside = [name for name in scaled_on_input if name not in targets]
        if outside:
            raise ValueError(
                f"feedforward_modules: {outside[0]!r} is none of target_modules {self.target_modules!r}: "
                "name it in both."
            )
        tables = [name for name in scaled_on_input if isinstance(targets[name], nn.Embedding)]
        if tables:
            raise ValueError(
                f"feedforward_modules: {tables[0]!r} is an Embedding, whose input is words and can't be scaled; leave "
                "it out, and its output is."
            )
        return {name: (layer, name in scaled_on_input) for name, layer in targets.items()}


class Scaled(LayerChange):
    """A layer f whose output or input is scaled: y = l ⊙ f(x), or y = f(l ⊙ x)."""

    def __init__(self, path: str, layer: nn.Module, name: str, *, on_input: bool) -> None:
        self.on_input, self.key = on_input, added_key("ia3_l", name)
        weight = next(iter(layer.parameters()), next(iter(layer.buffers()), torch.zeros(())))
        # At least float32, also next to a half-precision weight: small steps from 1 would be rounded away otherwise.
        dtype = (
            torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
        )
        ones = torch.ones(sizes(layer)[0 if on_input else 1], dtype=dtype, device=weight.device)
        super().__init__(path, layer, name, {self.key: nn.Parameter(ones)})

    @property
    def scale(self) -> Tensor:
        """The scales l. Shapes: (in) or (out)."""
        return self.layer.get_parameter(self.key)

    def describe(self) -> str:
        return f"{self.name}: scales its {'input' if self.on_input else 'output'}, merged={self.folded}"

    def forward(self, inner: Compute, own: bool, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.on_input:
            return inner(x * self.scale.to(x.dtype), *args, **kwargs)
        y = inner(x, *args, **kwargs)
        return y * self.scale.to(y.dtype)

    def folded_into(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = self.scale.to(weight.dtype)
        if self.on_input:
            return weight * scale, bias
        return weight * scale.unsqueeze(1), None if bias is None else bias * scale

    def trace(self, layer: nn.Module, x: Any, tape: Any, kind: str) -> Any:
        """The tape keeps what the scale is multiplied with, and a rounded scale for what flows on; the layer's own
        weight is frozen and keeps nothing."""
        if layer is not self.layer:
            return None
        y, learns = x.like(width=sizes(layer)[1]), tape.trains(self.scale)
        if learns:
            tape.save(x if self.on_input else y, kind)
        if x.grad and self.scale.element_size() != x.itemsize:
            tape.save(x.like(rows=1, width=len(self.scale)), kind)
        return y.like(grad=x.grad or learns)
