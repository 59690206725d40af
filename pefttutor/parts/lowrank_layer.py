"""A low-rank change of one layer: the trained factors A (r, in) and B (out, r) beside its weight.

    ΔW = s · B A          (out, in)

New are the parameters `lora_A` and `lora_B`; the layer's own weight stays where it is. Methods that make the factors of
more tensors, such as A of Λ and Q, say so in `factors`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor.kernels.lora_linear import lora_linear
from pefttutor.parts.attachment import added_key
from pefttutor.parts.layer_change import Compute
from pefttutor.parts.linear import sizes
from pefttutor.parts.weight_delta import WeightDelta

__all__ = ["Factored", "LowRank", "as_in_linear", "draw_factors", "singular_factors"]


def draw_factors(layer: nn.Module, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A uniform in ±1/√in, as in `nn.Linear`, and B zero; for an embedding A zero and B normal.

    They are drawn on the CPU, so that every device gets the same.

    Shapes: → (r, in), (out, r).
    """
    n_in, n_out = sizes(layer)
    if isinstance(layer, nn.Embedding):
        B = torch.empty(n_out, r, device="cpu").normal_(generator=generator)
        return torch.zeros(r, n_in, device="cpu"), B
    return as_in_linear((r, n_in), generator), torch.zeros(n_out, r, device="cpu")


def singular_factors(weight: Tensor, chosen: slice, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B with scaling · B A = Σ σ u vᵀ over the chosen singular triplets, largest first; at least in float32.

    >>> W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> for chosen in (slice(2), slice(-2, None)):
    ...     A, B = singular_factors(W, chosen, scaling=0.5)
    ...     (0.5 * B @ A).diag().round(decimals=4)
    tensor([3., 2., 0.])
    tensor([0., 2., 1.])

    Each factor gets the root of the strength: B = U √(S / s), A = √(S / s) Vᵀ. The first r make the best approximation
    of rank r.

    Shapes: (out, in) → (r, in), (out, r). Cost: a singular value decomposition, out·in·min(out, in).
    Source: Eckart and Young 1936; PiSSA's start: Meng et al. 2024, arXiv:2404.02948, eq. 2 and 3.
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
    root = (S[chosen] / scaling).sqrt()
    return (root[:, None] * Vh[chosen]).contiguous(), (U[:, chosen] * root).contiguous()


def as_in_linear(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Drawn as the weight of an `nn.Linear`: uniform in ±1/√columns; on the CPU."""
    return nn.init.kaiming_uniform_(torch.empty(shape, device="cpu"), a=math.sqrt(5), generator=generator)


class Factored(WeightDelta):
    """y = f(x) + s · drop(x) Aᵀ Bᵀ          x (…, in) → y (…, out); for an embedding y = f(i) + s · A[:, i]ᵀ Bᵀ

    A kind of it says `factors`, and has their width `r`.

    Cost: 2·r·(in + out) FLOPs a token; nothing once folded.
    """

    fused = True  # whether it is added into the layer's own product where it can be
    r: int

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r). It is asked in every step."""
        raise NotImplementedError

    def describe(self) -> str:
        return f"{self.name}: r={self.r}, scaling={self.scaling:g}, merged={self.folded}"

    def forward(self, inner: Compute, own: bool, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self.layer
        shared = own and self.plain and not (self.words or self.drops)
        if shared and (weight := layer.weight).is_floating_point():
            weight = weight.t() if self.transposed else weight
            return lora_linear(x, weight, layer.bias, *self.factors, self.scaling)
        # The two branches see different inputs, or the layer's own is computed by other code: nothing to share.
        return super().forward(inner, own, x, *args, **kwargs)

    def product(self, x: Tensor) -> Tensor:
        return self.branch(x, *self.factors)

    def branch(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """x Aᵀ Bᵀ, or for words A[:, i]ᵀ Bᵀ. Shapes: (…, in) → (…, out)."""
        if not self.words:
            return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))  # (…, r) → (…, out)
        layer: Any = self.layer
        # As in nn.Embedding, the padding row gets no gradient, so it stays as it is.
        rows = F.embedding(x, A.t(), layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)
        return F.linear(rows, B)

    def delta(self) -> Tensor:
        """ΔW = s · B A, at least in float32. Shapes: → (out, in)."""
        A, B = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in self.factors)
        return self.scaling * (B @ A)

    def trace(self, layer: nn.Module, x: Any, tape: Any, kind: str) -> Any:
        """x Aᵀ is kept, where A trains x, and factors that are made of others; with dropout also a mask and a changed
        copy of x.

        x is (tokens, in), or ids for an embedding.
        """
        if layer is not self.layer:
            return None
        with torch.enable_grad():  # what is made has a history, whatever mode the caller is in
            A, B = self.factors
        n_out, learns = B.shape[0], A.requires_grad or B.requires_grad
        if isinstance(layer, nn.Embedding):
            if A.requires_grad:
                tape.save(x, kind)
            if learns:
                tape.save(x.like(width=self.r, itemsize=A.element_size(), grad=True), kind)
            return x.like(width=n_out, itemsize=layer.weight.element_size(), grad=learns)
        y = x.like(width=n_out, grad=x.grad or learns)
        if not y.grad:
            return y
        held = {id(tensor) for tensor in self.added()}
        made = [
            factor for factor in (A, B) if not isinstance(factor, nn.Parameter) and id(factor) not in held
        ]
        if self.fused and not self.dropout:
            if A.requires_grad:
                tape.save(x, kind)
            if B.requires_grad:
                tape.save(x.like(width=self.r), kind)
            for factor in made:
                size = factor.element_size()
                tape.save(x.like(rows=factor.shape[0], width=factor.shape[1], itemsize=size), kind)
            return y
        narrow = tape.linear(tape.dropout(x, self.dropout), self.r, kind, weight=A.requires_grad)
        tape.linear(narrow, n_out, kind, weight=B.requires_grad)
        if A.element_size() != x.itemsize:  # the factors, rounded to the dtype of x
            made = [A, B]
        for factor in made:
            tape.save(x.like(rows=factor.shape[0], width=factor.shape[1]), kind)
        return y


class LowRank(Factored):
    """The change of a layer whose A and B are held as they are, for r · (in + out) values."""

    stored = True

    def __init__(
        self,
        path: str,
        layer: nn.Module,
        name: str,
        factors: tuple[Tensor, Tensor],
        *,
        scaling: float,
        dropout: float = 0.0,
        train_A: bool = True,
        beside: Mapping[str, Tensor] | None = None,
    ) -> None:
        """factors: A and B as they start. train_A: else A is a buffer. beside: more tensors, by their key."""
        A, B = factors
        self.r = len(A)
        self.keys = added_key("lora_A", name), added_key("lora_B", name)
        tensors = {"lora_A": nn.Parameter(A) if train_A else A, "lora_B": nn.Parameter(B), **(beside or {})}
        super().__init__(path, layer, name, tensors, scaling=scaling, dropout=dropout)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r). It is asked in every step."""
        layer, (A, B) = self.layer, self.keys
        return getattr(layer, A), getattr(layer, B)
