"""The layers that LoRA puts in the place of `nn.Linear` and `nn.Embedding` (GPT-2's are in `lora_conv1d`).

Each is a subclass of the layer that it replaces and holds the very same weight, so names, hooks and tied
weights stay as they were. New are the parameters `lora_A` (r, in) and `lora_B` (out, r).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor.kernels.lora_linear import lora_linear
from pefttutor.parts.modules import adopt

__all__ = ["LoRAEmbedding", "LoRALayer", "LoRALinear", "trace"]


class LoRALayer(nn.Module):
    """What the three kinds of layer share: their two factors, and merging them into the weight.

    ΔW = s · B A        (out, in), or its transpose where the weight is stored as (in, out)
    """

    weight_is_transposed: ClassVar[bool] = False
    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float
    lora_dropout: float
    base_weight: Tensor | None  # the weight without ΔW, while merged

    @classmethod
    def adapt(
        cls, layer: nn.Module, *, r: int, scaling: float, lora_dropout: float, generator: torch.Generator
    ) -> Self:
        """The LoRA form of `layer`, with fresh factors whose product is zero."""
        new = adopt(cls, layer)
        weight = new.weight
        n_in, n_out = cls.in_and_out(layer)
        A, B = cls.draw(n_in, n_out, r, generator)
        # At least float32, also next to a half-precision weight: small steps would be rounded away otherwise.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        new.lora_A = nn.Parameter(A.to(weight.device, dtype))
        new.lora_B = nn.Parameter(B.to(weight.device, dtype))
        new.scaling, new.lora_dropout = scaling, lora_dropout
        vars(new)["base_weight"] = None
        return new

    @classmethod
    def in_and_out(cls, layer: nn.Module) -> tuple[int, int]:
        """How many features go in and come out."""
        n_out, n_in = layer.weight.shape  # type: ignore[union-attr, misc]
        return (n_out, n_in) if cls.weight_is_transposed else (n_in, n_out)

    @staticmethod
    def draw(n_in: int, n_out: int, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A uniform in ±1/√in, as in `nn.Linear`, and B zero. On the CPU: the same draw on every device."""
        A = nn.init.kaiming_uniform_(torch.empty(r, n_in, device="cpu"), a=math.sqrt(5), generator=generator)
        return A, torch.zeros(n_out, r, device="cpu")

    @property
    def merged(self) -> bool:
        return self.base_weight is not None

    def merged_weight(self) -> Tensor:
        """W + ΔW, added in float32 at least and rounded once, to the weight's dtype."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.no_grad():
            delta = self.scaling * (self.lora_B.to(wide) @ self.lora_A.to(wide))  # (out, in)
            delta = delta.t() if self.weight_is_transposed else delta
            return (self.weight.to(wide) + delta).to(self.weight.dtype)

    def merge(self, weight: Tensor) -> None:
        """Compute with `weight` from now on. The base weight is kept: other layers may be tied to it."""
        vars(self)["base_weight"] = self.weight  # past nn.Module, which would add it to the state_dict
        self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)

    def unmerge(self) -> None:
        """Put the very same base weight back."""
        base = self.base_weight
        assert base is not None
        base.data = base.data.to(self.weight)  # the model may have moved meanwhile
        self.weight, vars(self)["base_weight"] = base, None

    def _use_merged(self) -> bool:
        if self.merged and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "this model is merged, so lora_A and lora_B would learn nothing: unmerge it, then train."
            )
        return self.merged

    def extra_repr(self) -> str:
        own = f"r={self.lora_A.shape[0]}, scaling={self.scaling:g}, merged={self.merged}"
        return f"{super().extra_repr()}, {own}"


class LoRALinear(LoRALayer, nn.Linear):
    """y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ          x (…, in) → y (…, out)."""

    def forward(self, x: Tensor) -> Tensor:
        if self._use_merged():
            return F.linear(x, self.weight, self.bias)
        return lora_forward(self, x, self.weight, self.bias)


def lora_forward(layer: LoRALayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The forward of the two linear layers; `weight` is (out, in)."""
    A, B, scaling = layer.lora_A, layer.lora_B, layer.scaling
    if layer.training and layer.lora_dropout > 0:  # the two branches see different inputs: nothing to share
        dropped = F.dropout(x, layer.lora_dropout)
        low_rank = F.linear(F.linear(dropped, A.to(x.dtype)), B.to(x.dtype))  # (…, r) → (…, out)
        return F.linear(x, weight, bias) + scaling * low_rank
    return lora_linear(x, weight, bias, A, B, scaling)


class LoRAEmbedding(LoRALayer, nn.Embedding):
    """y = W[i] + s · A[:, i]ᵀ Bᵀ          i (…) token ids → y (…, embedding_dim)

    "in" is the vocabulary, A starts at zero and B is normal. No dropout: ids can't be dropped.
    """

    weight_is_transposed = True

    @staticmethod
    def draw(n_in: int, n_out: int, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        B = torch.empty(n_out, r, device="cpu").normal_(generator=generator)
        return torch.zeros(r, n_in, device="cpu"), B

    def forward(self, ids: Tensor) -> Tensor:
        base = super().forward(ids)  # (…, embedding_dim)
        if self._use_merged():
            return base
        # as in nn.Embedding, the padding row gets no gradient, so it stays as it is
        rows = F.embedding(ids, self.lora_A.t(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        low_rank = F.linear(rows, self.lora_B)  # (…, r) → (…, embedding_dim)
        return base + self.scaling * low_rank.to(base.dtype)


def trace(layer: LoRALayer, x: Any, tape: Any, kind: str) -> Any:
    """What one LoRA layer keeps for its backward pass: x and x Aᵀ; with dropout also a mask and a changed copy of x.

    The formula of `forward` on a `pefttutor.memory.tape.Tape`: x is (tokens, in), or ids for an embedding.
    """
    r, (_, n_out) = layer.lora_A.shape[0], layer.in_and_out(layer)
    if isinstance(layer, LoRAEmbedding):
        width = layer.weight.element_size()
        narrow = x.like(width=r, itemsize=layer.lora_A.element_size(), grad=True)
        tape.save(x, kind)
        tape.save(narrow, kind)
        return x.like(width=n_out, itemsize=width, grad=True)
    if not layer.lora_dropout:
        tape.save(x, kind)
        tape.save(x.like(width=r), kind)
        return x.like(width=n_out, grad=True)
    narrow = tape.linear(tape.dropout(x, layer.lora_dropout), r, kind, weight=True)
    tape.linear(narrow, n_out, kind, weight=True)
    if layer.lora_A.element_size() != x.itemsize:  # the factors, rounded to the dtype of x
        for factor in (layer.lora_A, layer.lora_B):
            tape.save(x.like(rows=factor.shape[0], width=factor.shape[1]), kind)
    return x.like(width=n_out, grad=True)
