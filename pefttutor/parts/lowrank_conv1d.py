"""LoRA for GPT-2's `Conv1D`, a linear layer that stores its weight as (in, out).

Apart from the other layers because it needs transformers: imported only when transformers is loaded.
"""

from __future__ import annotations

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from pefttutor.parts.lowrank_layer import LoRALayer, lora_forward

__all__ = ["LoRAConv1D"]


class LoRAConv1D(LoRALayer, Conv1D):
    """y = x W + b + s · drop(x) Aᵀ Bᵀ          W (in, out); x (…, in) → y (…, out)."""

    weight_is_transposed = True
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self._use_merged():
            return super().forward(x)
        return lora_forward(self, x, self.weight.t(), self.bias)
