"""Sparse fine-tuning: train the entries of a mask, whoever has made it.

θ = θ₀ + M ⊙ Δ
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from pefttutor.method import DEFAULT
from pefttutor.parts.entries import train_entries
from pefttutor.parts.settings import check_names

__all__ = ["SparseFineTuning"]


@dataclass(frozen=True, kw_only=True)
class SparseFineTuning:
    """Train the entries where a mask is true; the others stay as they are, bit for bit.

    >>> model = SparseFineTuning().attach(nn.Linear(3, 2), {"weight": Tensor([[1, 0, 0], [0, 1, 0]]).bool()})
    >>> [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    [('weight_values', 2)]

    modules_to_save: modules that train fully and are saved along, such as a new head ("classifier").

    Gradients, optimizer state, the clipped norm and the saved file have k values each. Weight decay, where there is
    some, pulls the k entries towards 0 and nothing else.

    Cost: for k entries 4·k bytes of index, 4·k of values, 4·k of gradients and 8·k of AdamW's state in float32.
    Source: chapter eq. 4.5 and 4.6, with M fixed.
    """

    modules_to_save: Collection[str] = ()

    def __post_init__(self) -> None:
        check_names(self, "modules_to_save")

    def attach(
        self, model: nn.Module, masks: Mapping[str, Tensor] | None = None, *, name: str = DEFAULT
    ) -> nn.Module:
        """Freeze `model` but for the entries of `masks` and return it.

        masks: by the name of a parameter, booleans of its shape, or the flat places of its entries as int64. Whole
            numbers are always taken for places, so a mask of 0 and 1 is written mask.bool().
        Raises: ValueError if the name is in use, without masks, for a mask of another shape or model, or for masks in
            which nothing is chosen.
        """
        if masks is None:
            raise ValueError("SparseFineTuning needs masks: attach(model, {'layer.weight': booleans, …})")
        return train_entries(model, self, masks, self.modules_to_save, name=name)
