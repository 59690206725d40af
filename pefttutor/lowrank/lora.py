"""LoRA: freeze the weights, learn a low-rank change of some of them.

    h = W₀ x + ΔW x = W₀ x + s · B A x          s = lora_alpha / r

A (r, in) starts random and B (out, r) at zero, so the adapted model starts as the base model. Afterwards s · B A
can be added to W₀, and inference costs nothing extra.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pefttutor import method as base
from pefttutor.parts.lowrank_layer import LoRAEmbedding, LoRALayer, LoRALinear, trace

__all__ = ["LoRA"]


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adaptation of linear layers, embeddings and GPT-2's Conv1D.

    y = x W₀ᵀ + b + s · drop(x) Aᵀ Bᵀ,   s = lora_alpha / r   (use_rslora: lora_alpha / √r)

    r: rank of the change. lora_alpha: its strength; raising r alone lowers s, which acts like a smaller
        learning rate (use_rslora lowers it less).
    target_modules: names, or their last parts, or one regular expression (a string) for the whole name.
    lora_dropout: probability on the low-rank branch in training; costs a mask and a copy of x in every layer.
    modules_to_save: modules that train fully and are saved along, such as a new head ("score", "classifier").
        A weight tied to another layer's trains for both.
    init_seed: fixes the random factors, whatever the device.

    Shapes: A (r, in), B (out, r). For an embedding "in" is the vocabulary, A starts at zero and B is normal.
    Cost: trains r · (in + out) values a layer (`count`); 2·r·(in + out) more FLOPs a token, none once merged.
    Raises: ValueError for a value that makes no sense, before anything is changed.
    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3. rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
    """

    r: int = 8
    lora_alpha: float = 16
    target_modules: str | Collection[str] = ("q_proj", "v_proj")
    lora_dropout: float = 0.0
    use_rslora: bool = False
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or not _is_number(self.r) or self.r <= 0:
            raise ValueError(f"r is {self.r!r}; it must be a whole number ≥ 1.")
        if not _is_number(self.lora_alpha) or not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha is {self.lora_alpha!r}; it must be a number > 0 (usual: r or 2·r).")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout!r}; it must be a probability in [0, 1).")
        if not isinstance(self.init_seed, int):
            raise ValueError(f"init_seed is {self.init_seed!r}; it must be a whole number.")
        if not self.target_modules:
            raise ValueError(
                "target_modules is empty; name at least one module, such as ('q_proj', 'v_proj')."
            )
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"modules_to_save is a string; write ({self.modules_to_save!r},).")
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        object.__setattr__(self, "modules_to_save", tuple(self.modules_to_save))

    @property
    def scaling(self) -> float:
        """s, the factor of B A."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze `model`, put LoRA layers in the place of its target modules, and return it.

        Raises: RuntimeError if it is adapted already; ValueError if a name doesn't exist, a layer can't be
            adapted or is smaller than r. Nothing has been changed then.
        """
        base.refuse_adapted(model)
        kinds = _kinds()
        targets = base.find_modules(model, self.target_modules, kinds)
        fully_trained = self._fully_trained(model)
        for name, layer in targets.items():
            self._check(name, layer, kinds[type(layer)], fully_trained)

        generator = torch.Generator().manual_seed(self.init_seed)
        settings: dict[str, Any] = {"r": self.r, "scaling": self.scaling, "lora_dropout": self.lora_dropout}
        new = {
            name: kinds[type(layer)].adapt(layer, generator=generator, **settings)
            for name, layer in targets.items()
        }  # all of them before the first replacement: this may run out of memory

        base.freeze(model)
        for name, layer in new.items():
            base.replace_module(model, name, layer)
        buffers = []
        for name, module in fully_trained.items():
            for parameter in module.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
            saved = module.state_dict()  # without the buffers that aren't persistent
            buffers += [f"{name}.{key}" for key, _ in module.named_buffers() if key in saved]
        return base.mark(model, self, buffers=buffers)

    def merge(self, model: nn.Module) -> nn.Module:
        """Fold s · B A into the weights: the same function at the base's cost. Keeps the base weights aside.

        Raises: RuntimeError if `model` carries no LoRA or is merged already.
        """
        layers = _layers(model)
        weights = [layer.merged_weight() for layer in layers]
        base.switch_merged(model, LoRA, to=True)
        for layer, weight in zip(layers, weights, strict=True):
            layer.merge(weight)
        return model

    def unmerge(self, model: nn.Module) -> nn.Module:
        """Put the base weights back, exactly as they were. Raises: RuntimeError if `model` isn't merged."""
        base.switch_merged(model, LoRA, to=False)
        for layer in _layers(model):
            layer.unmerge()
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: Σ r · (in + out) over the targets, and modules_to_save."""
        kinds = _kinds()
        kinds |= {kind: kind for kind in kinds.values()}  # also of a model that is adapted already
        targets = base.find_modules(model, self.target_modules, kinds)
        low_rank = sum(self.r * sum(kinds[type(m)].in_and_out(m)) for m in targets.values())
        saved = {p for module in self._fully_trained(model).values() for p in module.parameters()}
        return low_rank + sum(p.numel() for p in saved if p.is_floating_point())

    def trace(self, layer: nn.Module, x: Any, tape: Any, kind: str) -> Any:
        """What a LoRA layer keeps for the backward pass, for `pefttutor.memory`; None for any other layer."""
        return trace(layer, x, tape, kind) if isinstance(layer, LoRALayer) else None

    def _fully_trained(self, model: nn.Module) -> dict[str, nn.Module]:
        if not self.modules_to_save:
            return {}
        return base.find_modules(model, self.modules_to_save, field="modules_to_save")

    def _check(self, name: str, layer: nn.Module, kind: type[LoRALayer], saved: dict[str, nn.Module]) -> None:
        weight = layer._parameters.get("weight")
        if weight is None or not weight.is_floating_point():
            raise ValueError(
                f"target_modules: {name!r} has no plain floating-point weight (is it quantised or pruned?)."
            )
        if getattr(layer, "max_norm", None) is not None:
            raise ValueError(
                f"target_modules: {name!r} has max_norm, which rewrites its weight in every forward pass."
            )
        if self.r > min(kind.in_and_out(layer)):
            n_in, n_out = kind.in_and_out(layer)
            raise ValueError(
                f"r is {self.r}, but {name!r} maps {n_in} to {n_out}: r must be at most {min(n_in, n_out)}."
            )
        for head, module in saved.items():
            if any(layer is part for part in module.modules()):
                raise ValueError(
                    f"{name!r} is a target and part of {head!r} in modules_to_save: it can be only one."
                )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _kinds() -> dict[type, type[LoRALayer]]:
    """Which layer takes the place of which. Conv1D only if transformers is loaded: else no model has one."""
    kinds: dict[type, type[LoRALayer]] = {nn.Linear: LoRALinear, nn.Embedding: LoRAEmbedding}
    if "transformers.pytorch_utils" in sys.modules:
        from transformers.pytorch_utils import Conv1D

        from pefttutor.parts.lowrank_conv1d import LoRAConv1D

        kinds[Conv1D] = LoRAConv1D
    return kinds


def _layers(model: nn.Module) -> list[LoRALayer]:
    return [module for module in model.modules() if isinstance(module, LoRALayer)]
