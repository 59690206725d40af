"""PaFi: train the entries that pre-training has left smallest. No data, no gradient, one mask for all tasks.

M_i = 1 for the k smallest |θ₀_i|,  k = fraction · n
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn

from pefttutor.method import DEFAULT
from pefttutor.parts.entries import candidates, train_entries
from pefttutor.parts.ranking import largest_share
from pefttutor.parts.settings import check_fraction, check_names

__all__ = ["PaFi"]


@dataclass(frozen=True, kw_only=True)
class PaFi:
    """Train the smallest entries by absolute value, over all tensors but the embeddings.

    >>> layer = nn.Linear(4, 1, bias=False)
    >>> layer.weight.data = Tensor([[3.0, -0.1, -2.0, 0.5]])
    >>> PaFi(fraction=0.5).masks(layer)
    {'weight': tensor([[False,  True, False,  True]])}

    fraction: share of those tensors' n entries that train; the count ⌊fraction · n⌋ is exact (at least 1).
    modules_to_save: modules that train fully and are saved along, such as a new head; n doesn't count them.

    Cost: choosing takes one pass over the weights; training costs what it does in `SparseFineTuning`.
    Raises: ValueError for a fraction outside (0, 1].
    Source: Liao et al. 2023, arXiv:2305.16742; chapter 4.3.1 ("PaFi").
    """

    fraction: float = 0.005
    modules_to_save: Collection[str] = ()

    def __post_init__(self) -> None:
        check_fraction(self)
        check_names(self, "modules_to_save")

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model` but for the chosen entries and return it. Raises: ValueError if the name is in use."""
        return train_entries(model, self, self.masks(model), self.modules_to_save, name=name)

    def masks(self, model: nn.Module) -> dict[str, Tensor]:
        """What would be chosen, by the name of each tensor; changes nothing."""
        tables = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        tensors = candidates(model, self.modules_to_save)
        scores = {name: -p.detach().abs() for name, p in tensors.items() if p not in tables}
        return largest_share(scores, self.fraction)
