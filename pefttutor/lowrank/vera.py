"""VeRA: two random matrices for the whole model, and for each layer two vectors that scale them.

    ΔW = diag(b) B diag(d) A

A (r, in) and B (out, r) are drawn once, shared by all layers, and never trained; b (out) starts at zero, so the model
starts as it was. All that is learned, and all that a file has to hold, are b and d.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.added import Shared
from pefttutor.parts.drawing import drawn_again
from pefttutor.parts.linear import sizes
from pefttutor.parts.lowrank_targets import add_lowrank, check_lowrank, count_lowrank, lowrank_targets
from pefttutor.parts.settings import check_choice, check_number
from pefttutor.parts.weight_delta import WeightDelta, beside

__all__ = ["VeRA", "draw_projections"]

A_KEY, B_KEY = "vera_A", "vera_B"


def draw_projections(n_in: int, n_out: int, r: int, key: int) -> tuple[Tensor, Tensor]:
    """A and B, Kaiming-uniform: in ±√(6 / columns). The same bits for a key, in every release of torch.

    >>> A, B = draw_projections(6, 4, r=3, key=0)
    >>> A.shape, B.shape, bool(A.abs().max() <= 1)
    (torch.Size([3, 6]), torch.Size([4, 3]), True)

    Shapes: → (r, in), (out, r).
    """
    shapes = (r, n_in), (n_out, r)
    A, B = (
        drawn_again(shape, key, stream=stream).mul_(2).sub_(1).mul_(math.sqrt(6 / shape[1]))
        for stream, shape in enumerate(shapes)
    )
    return A, B


@dataclass(frozen=True, kw_only=True)
class VeRA:
    """Vector-based random matrix adaptation of linear layers and GPT-2's Conv1D.

    y = x W₀ᵀ + bias + b ⊙ (d ⊙ (drop(x) Aᵀ)) Bᵀ

    >>> model = nn.ModuleDict({"q_proj": nn.Linear(6, 4), "v_proj": nn.Linear(6, 4)})
    >>> VeRA(r=3).count(model)                                        # 2 · (3 + 4)
    14

    r: how many random directions each layer weighs; much larger than LoRA's, for each costs one value.
    d_initial: where d starts. There is no lora_alpha.
    projection_prng_key: fixes A and B, whatever the device.
    save_projection: whether files hold A and B, which may then be any, such as those of a file of HF PEFT's.
    target_modules, modules_to_save: as in LoRA. vera_dropout: on the input of the change, in training.

    A and B have the size of the largest target; a smaller layer takes their first columns and rows. They lie in the
    model once, as buffers, and by default in no file: they are drawn again from the key, by a generator whose numbers
    are fixed for good. (HF PEFT draws with torch's, and so advises to store them.) A checkpoint of `fit` holds them.

    Shapes: d (r), b (out); A (r, largest in), B (largest out, r).
    Cost: it trains r + out values a layer (`count`) and holds r · (in + out) for the whole model. A token takes
        2·r·(in + out) FLOPs more a layer, none once merged, and r + out numbers are kept for the backward pass.
    Raises: ValueError for a value that makes no sense, before anything is changed.
    Source: Kopiczko et al. 2023, arXiv:2310.11454, eq. 2.
    """

    r: int = 256
    d_initial: float = 0.1
    target_modules: str | Collection[str] = ("q_proj", "v_proj")
    vera_dropout: float = 0.0
    modules_to_save: Collection[str] = ()
    projection_prng_key: int = 0
    save_projection: bool = False

    def __post_init__(self) -> None:
        check_lowrank(self, alpha=None, dropout="vera_dropout", seed="projection_prng_key")
        check_number(self, "d_initial")
        check_choice(self, "save_projection", (True, False))

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, draw A and B, give its target modules the two vectors, and return it.

        Raises: ValueError if the name is in use, a module doesn't exist, or a layer can't be adapted. The model is
            then as it was.
        """
        with attaching(model, self, name) as new:
            targets = lowrank_targets(model, self, rank=None, words=False)
            n_in, n_out = (max(side) for side in zip(*map(sizes, targets.values()), strict=True))
            drawn = draw_projections(n_in, n_out, self.r, self.projection_prng_key)
            placed = beside(next(iter(targets.values())), dict(zip((A_KEY, B_KEY), drawn, strict=True)))
            shared = Shared(model, name, placed, stored=self.save_projection)
            new.add(shared)
            how = {"shared": shared, "dropout": self.vera_dropout}
            add_lowrank(new, model, self._vectors, Rescaled, rank=None, words=False, **how)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: Σ r + out over the targets, and modules_to_save."""
        return count_lowrank(model, self, lambda n_in, n_out: self.r + n_out, rank=None, words=False)

    def _vectors(self, layer: nn.Module) -> dict[str, Tensor]:
        d, b = torch.full((self.r,), float(self.d_initial)), torch.zeros(sizes(layer)[1])
        return {"vera_lambda_d": nn.Parameter(d), "vera_lambda_b": nn.Parameter(b)}


class Rescaled(WeightDelta):
    """y = f(x) + b ⊙ (d ⊙ (drop(x) Aᵀ)) Bᵀ, with A and B of all layers."""

    def __init__(
        self,
        path: str,
        layer: nn.Module,
        name: str,
        tensors: Mapping[str, Tensor],
        *,
        shared: Shared,
        **how: float,
    ) -> None:
        """shared: A and B."""
        super().__init__(path, layer, name, tensors, **how)
        self.shared, self.shape = shared, sizes(layer)

    @property
    def projections(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of this layer."""
        n_in, n_out = self.shape
        A, B = self.shared.get(A_KEY, B_KEY, device=self.vectors[0].device)
        return A[:, :n_in], B[:n_out]

    @property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """d (r) and b (out)."""
        return self.held("vera_lambda_d"), self.held("vera_lambda_b")

    def product(self, x: Tensor) -> Tensor:
        A, B, d, b = (each.to(x.dtype) for each in (*self.projections, *self.vectors))
        return b * F.linear(d * F.linear(x, A), B)  # (…, r) → (…, out)

    def delta(self) -> Tensor:
        (A, B), (d, b) = self.projections, self.vectors
        wide = torch.promote_types(d.dtype, torch.float32)
        return b.to(wide)[:, None] * ((B.to(wide) * d.to(wide)) @ A.to(wide))

    def trace(self, layer: nn.Module, x: Any, tape: Any, kind: str) -> Any:
        """x Aᵀ is kept for d, and what B makes of it for b; beside a half-precision weight rounded A and B, too."""
        if layer is not self.layer:
            return None
        (A, B), (d, b) = self.projections, self.vectors
        learns = tape.trains(d, b)
        seen, y = tape.dropout(x, self.dropout), x.like(width=len(b), grad=x.grad or learns)
        if d.element_size() != x.itemsize:
            for factor in [*([B] if y.grad else []), *([A] if x.grad else [])]:
                tape.save(x.like(rows=factor.shape[0], width=factor.shape[1]), kind)
            for vector in [*([b] if y.grad else []), *([d] if x.grad else [])]:
                tape.save(x.like(rows=1, width=len(vector)), kind)
        for width in (len(d), len(b)) if learns else ():
            tape.save(seen.like(width=width), kind)
        return y
