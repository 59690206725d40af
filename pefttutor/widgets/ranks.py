"""The rank of what a method learnt: `ranks.figure` over all layers, `ranks` with a slider that truncates ΔW."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets
import torch
from torch import nn

from pefttutor.widgets.explorer import Explorer
from pefttutor.widgets.rank_figures import draw_layer, draw_overview
from pefttutor.widgets.spectrum import Update, truncated, updates
from pefttutor.widgets.style import Picture, paper

_ALT = "The rank of ΔW: one layer's matrix, what its leading singular directions keep of it, and its singular values."


class Scores:
    """The model's score by rank, measured when asked for the first time. `by_rank` holds what has been measured.

    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> rank_of_weight = lambda model: torch.linalg.matrix_rank(model[0].weight)
    >>> Scores(model, updates({"0": model[0].weight}), rank_of_weight).measured(2)
    {2: 2.0}
    """

    def __init__(self, model: nn.Module, found: Mapping[str, Update], score: Callable[[Any], float]) -> None:
        self.by_rank: dict[int, float] = {}
        self._model, self._found, self._score = model, found, score

    def measured(self, rank: int) -> dict[int, float]:
        """All scores that are known by now, that of `rank` among them."""
        if rank not in self.by_rank:
            with torch.no_grad(), truncated(self._model, self._found, rank):
                measured = float(self._score(self._model))
            if not math.isfinite(measured):
                raise ValueError(f"score(model) gave {measured} at rank {rank}; expected a finite number")
            self.by_rank[rank] = measured
        return self.by_rank


class _Ranks:
    """`widgets.ranks.figure(model)` is the static picture of all layers, `widgets.ranks(model)` the explorer.

    >>> ranks.figure({"q_proj": torch.eye(4)}).alt[:63]
    'Effective rank of ΔW in 1 layers, from 4.0 to 4.0 (median 4.0) '
    """

    def figure(self, source: Any, *, base: Any = None, modules: Sequence[str] | None = None) -> Picture:
        """Effective rank by layer and module, and every spectrum. Arguments and errors are those of `updates`."""
        by_layer = updates(source, base=base, modules=modules)
        with paper():
            return draw_overview(by_layer)

    def __call__(
        self,
        source: Any,
        *,
        base: Any = None,
        modules: Sequence[str] | None = None,
        score: Callable[[Any], float] | None = None,
        score_name: str = "score",
        rank: int = 1,
    ) -> Explorer:
        """Truncate every ΔW to its `rank` leading directions: one layer's matrix, its σ, and the model's score.

            widgets.ranks(model, score=lambda model: pefttutor.evaluate(model, test)["accuracy"], score_name="accuracy")

        source, base, modules: see `pefttutor.widgets.spectrum.updates`. A snapshot: call again after more training.
        score: measures the model with all its ΔW truncated. It is called once for each rank that the slider comes to,
            and at the start for rank 0 (no ΔW) and for the full rank; the model is put back bit by bit
            afterwards, also after an exception.
        rank: where the slider starts.

        Raises: what `updates` raises; ValueError for a rank out of range, or a score without a model to measure.
        """
        by_layer = updates(source, base=base, modules=modules)
        full = max(len(update.sigma) for update in by_layer.values())
        if not 0 <= rank <= full:
            raise ValueError(f"rank={rank}: expected a rank from 0 to {full}")
        if score is not None and not isinstance(source, nn.Module):
            raise ValueError("score= needs the model that it is to measure; only matrices were given")
        scores = Scores(source, by_layer, score) if score else None
        if scores:
            scores.measured(0)
            scores.measured(full)

        def draw(rank: int, layer: str) -> Picture:
            by_rank = scores.measured(rank) if scores else None
            return draw_layer(layer, by_layer[layer], rank, by_rank, score_name)

        slider = ipywidgets.IntSlider(value=rank, min=0, max=full, continuous_update=False)
        return Explorer(draw, _ALT, rank=slider, layer=list(by_layer))


ranks = _Ranks()
