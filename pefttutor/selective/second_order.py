"""SAM in the chapter's sense: choose the entries by which a second-order model of the loss falls most.

    L(θ + M ⊙ Δ) ≈ L(θ) + gᵀ(M ⊙ Δ) + ½ Σ_i M_i h_i Δ_i²,     minimal at Δ_i = −g_i / h_i,  falling by g_i² / (2 h_i)

so the best mask of k entries takes the k largest g_i² / h_i. (Another "SAM", sharpness-aware minimisation, is
something else.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pefttutor.method import DEFAULT
from pefttutor.parts.entries import candidates, train_entries
from pefttutor.parts.information import fisher_information, total_gradient
from pefttutor.parts.ranking import largest_share, without_values
from pefttutor.parts.settings import check_examples, check_fraction, check_names, check_number

__all__ = ["SecondOrderMask", "second_order_scores"]


def second_order_scores(gradient: Tensor, curvature: Tensor | None = None) -> Tensor:
    """g² / h, twice what the loss falls by if an entry alone goes to its best value; without h, g².

    >>> second_order_scores(Tensor([2.0, 2.0]), Tensor([1.0, 4.0]))         # where the loss is steep, less is gained
    tensor([4., 1.])

    Shapes: gradient, curvature (…) → (…). Raises: ValueError if a curvature isn't positive.
    """
    if curvature is None:
        return gradient.square()
    if not (curvature > 0).all():
        raise ValueError(
            f"the smallest curvature is {curvature.min().item():.3g}; expected all > 0: add a damping"
        )
    return gradient.square() / curvature


@dataclass(frozen=True, kw_only=True)
class SecondOrderMask:
    """Choose by the gradient of the whole data, (Σ_s g_s)², and train these entries, as `SparseFineTuning` does.

    FISH takes Σ_s g_s²: an entry on whose direction the examples disagree scores high there and low here.

    >>> examples = [{"x": Tensor([3.0, 1.0])}, {"x": Tensor([-3.0, 1.0])}]      # (Σ g)² is 0 and 4
    >>> log_likelihood = lambda model, batch: model(batch["x"]).sum(1)
    >>> SecondOrderMask(fraction=0.5).masks(nn.Linear(2, 1, bias=False), examples, log_likelihood=log_likelihood)
    {'weight': tensor([[False,  True]])}

    fraction: share of the entries that train.
    damping: None sets h to 1 for all entries, as the authors' code does; a number takes h = Fisher information +
        damping · its mean, where the Fisher information stands for the Hessian's diagonal.
    per_tensor: True takes the same share in each tensor, as the authors' code does; False ranks all entries together.
    modules_to_save: modules that train fully and are saved along, such as a new head; they take no part in the choice.

    Cost: choosing costs a backward pass over the examples (and the Fisher information, if damped); training costs what
        it does in `SparseFineTuning`.
    Raises: ValueError for a fraction outside (0, 1] or a damping ≤ 0.
    Source: Fu et al. 2023, arXiv:2211.15583, theorem 2; chapter 4.3.2 ("SAM").
    """

    fraction: float = 0.005
    damping: float | None = None
    per_tensor: bool = True
    modules_to_save: Collection[str] = ()

    def __post_init__(self) -> None:
        check_fraction(self)
        check_names(self, "modules_to_save")
        if self.damping is not None:
            check_number(self, "damping", above=0, hint=", or None for h = 1")

    def attach(
        self, model: nn.Module, examples: Sequence[Any] | None = None, *, name: str = DEFAULT, **how: Any
    ) -> nn.Module:
        """Choose entries by `examples`, freeze the others, and return `model`. `how`: see `fisher_information`.

        Raises: ValueError if the name is in use, or there are no examples.
        """
        return train_entries(model, self, self.masks(model, examples, **how), self.modules_to_save, name=name)

    def masks(self, model: nn.Module, examples: Sequence[Any] | None, **how: Any) -> dict[str, Tensor]:
        """What would be chosen, by the name of each tensor; changes nothing."""
        scores = candidates(model, self.modules_to_save)
        if not without_values(scores):
            scores = self._scores(model, check_examples(self, examples, labels=not how), scores, **how)
        if not self.per_tensor:
            return largest_share(scores, self.fraction)
        by_tensor = [largest_share({name: score}, self.fraction) for name, score in scores.items()]
        return {name: mask for masks in by_tensor for name, mask in masks.items()}

    def _scores(
        self, model: nn.Module, examples: Sequence[Any], names: Iterable[str], **how: Any
    ) -> dict[str, Tensor]:
        curvature: dict[str, Tensor] = {}
        if self.damping is not None:
            fisher = fisher_information(model, examples, **how)
            curvature = {n: f + self.damping * f.mean().clamp(min=1e-30) for n, f in fisher.items()}
        gradient = total_gradient(model, examples, **how)
        return {n: second_order_scores(gradient[n], curvature.get(n)) for n in names}
