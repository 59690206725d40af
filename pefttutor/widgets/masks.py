"""Which entries a method trains: `masks.figure` compares choices, `masks` looks into one of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from pefttutor.widgets.explorer import Explorer
from pefttutor.widgets.mask_figures import draw_overview, draw_tensor
from pefttutor.widgets.mask_source import at_fraction, choices
from pefttutor.widgets.style import Picture, paper

_ALT = "The entries that a method trains: in one tensor, by block, by kind of tensor, and next to another method's."
FRACTIONS = (0.001, 0.005, 0.02, 0.1, 0.3)


class _Masks:
    """`widgets.masks.figure(choices)` is the static picture, `widgets.masks(choices)` the explorer.

    >>> masks.figure({"weight": torch.tensor([0.1, 0.9, 0.5, 0.3])}, fraction=0.25).alt
    'Share of entries that train: mask 25.00%.'
    """

    def figure(self, source: Any, *, fraction: float = 0.005) -> Picture:
        """Share of chosen entries by block and kind of tensor, and the overlaps. The arguments are those of `masks`."""
        by_choice = choices(source)
        _check(fraction)
        chosen = {name: at_fraction(tensors, fraction) for name, tensors in by_choice.items()}
        with paper():
            return draw_overview(chosen)

    def __call__(
        self, source: Any, *, fractions: Sequence[float] = FRACTIONS, tensor: str | None = None
    ) -> Explorer:
        """Choose a method, another to compare with, a tensor and, where there are scores, the fraction.

            widgets.masks({"FISH": fisher, "smallest": {n: -p.abs() for n, p in model.named_parameters()}})
            widgets.masks(model)                       # what an attached method trains

        source: an adapted model; masks (booleans) or scores (larger is chosen first) by the name of a tensor; or
            several of them by a name of one's own. Of several, the tensors that all have are shown.
        fractions: what can be chosen of scores, over all tensors together; a mask is shown as it is.
        tensor: which one is shown first; by default the first matrix.

        Raises: ValueError for anything else, NaN among scores, a fraction outside (0, 1], an unknown tensor.
        """
        by_choice = choices(source)
        names, methods = list(next(iter(by_choice.values()))), list(by_choice)
        for fraction in fractions:
            _check(fraction)
        if tensor is None:
            first = next(iter(by_choice.values()))
            tensor = next((n for n in names if first[n].dim() == 2), names[0])
        if tensor not in names:
            raise ValueError(f"there is no tensor {tensor!r}; there are {', '.join(names[:8])}, …")

        @lru_cache(maxsize=16)
        def masks(method: str, fraction: float) -> dict[str, torch.Tensor]:
            return at_fraction(by_choice[method], fraction)

        def draw(method: str, compare_with: str, tensor: str, fraction: float = 1.0) -> Picture:
            return draw_tensor(
                method, compare_with, tensor, masks(method, fraction), masks(compare_with, fraction)
            )

        controls: dict[str, Any] = {
            "method": methods,
            "compare_with": [*methods[1:], methods[0]],
            "tensor": [tensor, *(n for n in names if n != tensor)],
        }
        if any(t.is_floating_point() for tensors in by_choice.values() for t in tensors.values()):
            controls["fraction"] = list(fractions)
        return Explorer(draw, _ALT, **controls)


def _check(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction!r}; it must be in (0, 1]")


masks = _Masks()
