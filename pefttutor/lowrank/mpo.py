"""MPO: a weight is a chain of tensors, of which the large one in the middle stays as it is and the small ones train.

    W[o₁…oₙ, i₁…iₙ] = T₁[o₁ i₁] T₂[o₂ i₂] … Tₙ[oₙ iₙ]          a product of matrices, one for each pair of indices

Rows and columns of the weight are numbered by n indices each, as 24 rows by 2 · 4 · 3. Such a chain is called a matrix
product operator in physics, and tensor train elsewhere. It holds any weight where its bonds are wide enough.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor.kernels.precision import unrounded
from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.linear import dense_weight, sizes
from pefttutor.parts.lowrank_targets import add_lowrank, check_lowrank, count_lowrank, lowrank_targets
from pefttutor.parts.settings import check_whole
from pefttutor.parts.weight_delta import WeightDelta

__all__ = ["MPO", "contracted", "decomposed", "split_evenly"]


@cache
def split_evenly(size: int, n: int) -> tuple[int, ...]:
    """n whole numbers whose product is `size` and whose sum is the smallest, the largest in the middle.

    >>> split_evenly(768, 3), split_evenly(24, 3), split_evenly(7, 3)
    ((8, 12, 8), (2, 4, 3), (1, 7, 1))
    """
    factors = sorted(_smallest_sum(size, n))
    return (*factors[::2], *reversed(factors[1::2]))


@cache
def _smallest_sum(size: int, n: int) -> tuple[int, ...]:
    if n == 1:
        return (size,)
    small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    choices = [(d, *_smallest_sum(size // d, n - 1)) for d in {*small, *(size // d for d in small)}]
    return min(choices, key=lambda factors: (sum(factors), sorted(factors)))


def bonds(rows: Sequence[int], columns: Sequence[int], bond_dim: int | None) -> list[int]:
    """How wide the chain is before, between and after its tensors: as wide as it can be, or bond_dim.

    >>> bonds((2, 4, 3), (2, 5, 3), None), bonds((2, 4, 3), (2, 5, 3), 3)
    ([1, 4, 9, 1], [1, 3, 3, 1])
    """
    pairs = [o * i for o, i in zip(rows, columns, strict=True)]
    widths = [1]
    for k in range(1, len(pairs)):
        most = min(widths[-1] * pairs[k - 1], math.prod(pairs[k:]))
        widths.append(most if bond_dim is None else min(most, bond_dim))
    return [*widths, 1]


def decomposed(
    weight: Tensor, rows: Sequence[int], columns: Sequence[int], bond_dim: int | None = None
) -> list[Tensor]:
    """The tensors of the chain, one singular value decomposition after the other; at least in float32.

    >>> W = torch.arange(24.0).view(4, 6)
    >>> tensors = decomposed(W, (2, 1, 2), (2, 3, 1))
    >>> [tuple(T.shape) for T in tensors], torch.allclose(contracted(tensors), W, atol=1e-4)
    ([(1, 2, 2, 4), (4, 1, 3, 2), (2, 2, 1, 1)], True)

    With a narrower bond what is lost is at most the root of the sum of the squares of all singular values dropped.

    Shapes: (out, in) → (d_{k−1}, o_k, i_k, d_k) for each k. Cost: n − 1 decompositions, the largest of about the
        weight's size. Source: Oseledets 2011, algorithm 1.
    """
    n, d = len(rows), bonds(rows, columns, bond_dim)
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    order = [place for k in range(n) for place in (k, n + k)]
    rest, chain = wide.reshape(*rows, *columns).permute(order).contiguous(), [wide] * n
    for k in range(n // 2):  # from the left: what is orthogonal stays, the strength goes on to the middle
        U, S, Vh = torch.linalg.svd(rest.reshape(d[k] * rows[k] * columns[k], -1), full_matrices=False)
        chain[k], rest = U[:, : d[k + 1]], S[: d[k + 1], None] * Vh[: d[k + 1]]
    for k in reversed(range(n // 2 + 1, n)):  # and from the right
        U, S, Vh = torch.linalg.svd(rest.reshape(-1, rows[k] * columns[k] * d[k + 1]), full_matrices=False)
        chain[k], rest = Vh[: d[k]], U[:, : d[k]] * S[: d[k]]
    chain[n // 2] = rest
    return [T.reshape(d[k], rows[k], columns[k], d[k + 1]).contiguous() for k, T in enumerate(chain)]


def contracted(tensors: Sequence[Tensor]) -> Tensor:
    """The weight that a chain holds. Shapes: (d_{k−1}, o_k, i_k, d_k) for each k → (out, in)."""
    whole = tensors[0][0]  # (o₁, i₁, d₁)
    for T in tensors[1:]:
        whole = torch.einsum("oid,dpjf->opijf", whole, T).flatten(2, 3).flatten(0, 1)
    return whole[..., 0]


@dataclass(frozen=True, kw_only=True)
class MPO:
    """Matrix product operators of linear layers and GPT-2's Conv1D: the auxiliary tensors train, the central one not.

    y = x W₀ᵀ + b + x ΔWᵀ,   ΔW = T₁ … T_c … Tₙ − T₁⁰ … T_c … Tₙ⁰,  c = (n + 1) / 2

    >>> model = nn.ModuleDict({"q_proj": nn.Linear(24, 24)})       # 2 · 4 · 3 rows and columns, bonds of 4 and 9
    >>> MPO(target_modules=("q_proj",)).count(model)               # 2 · 2 · 4 + 9 · 3 · 3
    97

    n: how many tensors, an odd number. bond_dim: how wide the bonds may be; None lets the chain hold the whole weight.
    target_modules, modules_to_save: as in LoRA.

    A weight of full bonds takes more values as a chain than as a matrix: what is saved is training, and not memory. The
    authors cut the bonds and put the chain in the weight's place; here the base keeps its weight, bit for bit, and the
    chain says how it changes, so that narrow bonds lose nothing of it. ΔW may have any rank.

    An adapter file holds the whole chain and its start, since another machine's decomposition may differ in signs.

    Shapes: T_k (d_{k−1}, o_k, i_k, d_k).
    Cost: it trains Σ d_{k−1} o_k i_k d_k values a layer over all k but the middle (`count`), and holds the middle one
        and the start of the others beside. A step forms ΔW, and a token takes 2·in·out FLOPs more, none once merged;
        attaching takes n − 1 decompositions a layer.
    Raises: ValueError for a value that makes no sense, before anything is changed.
    Source: Liu et al. 2021, arXiv:2106.02205, sections 3 and 4.
    """

    n: int = 3
    bond_dim: int | None = None
    target_modules: str | Collection[str] = ("q_proj", "v_proj")
    modules_to_save: Collection[str] = ()

    def __post_init__(self) -> None:
        check_lowrank(self, rank="n", alpha=None, dropout=None, seed=None)
        if self.n < 3 or self.n % 2 == 0:
            raise ValueError(
                f"n is {self.n}; it must be an odd number ≥ 3, so that one tensor is in the middle."
            )
        if self.bond_dim is not None:
            check_whole(self, "bond_dim")

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, decompose the weights of its target modules, and return it.

        Raises: ValueError if the name is in use, a module doesn't exist, or a layer can't be adapted, can't tell its
            weight, or has no bond as wide as bond_dim. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            self._check(model)
            add_lowrank(new, model, self._chain, MatrixProduct, rank=None, words=False)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: those of all tensors but the middle, and modules_to_save."""
        self._check(model)
        return count_lowrank(model, self, self._values, rank=None, words=False)

    def _check(self, model: nn.Module) -> None:
        for path, layer in lowrank_targets(model, self, rank=None, words=False).items():
            most = max(bonds(*self._split(*sizes(layer)), None))
            if self.bond_dim is not None and self.bond_dim > most:
                raise ValueError(
                    f"bond_dim is {self.bond_dim}, but the chain of {path!r}, which maps {sizes(layer)[0]} to "
                    f"{sizes(layer)[1]}, holds all of it with bonds of at most {most}: give at most that, or None."
                )

    def _split(self, n_in: int, n_out: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return split_evenly(n_out, self.n), split_evenly(n_in, self.n)

    def _values(self, n_in: int, n_out: int) -> int:
        rows, columns = self._split(n_in, n_out)
        d = bonds(rows, columns, self.bond_dim)
        every = [d[k] * rows[k] * columns[k] * d[k + 1] for k in range(self.n)]
        return sum(every) - every[self.n // 2]

    def _chain(self, layer: nn.Module) -> dict[str, Tensor]:
        chain = decomposed(dense_weight(layer), *self._split(*sizes(layer)), self.bond_dim)
        tensors = {}
        for k, T in enumerate(chain):
            middle = k == self.n // 2
            tensors[f"mpo_{k}"] = T if middle else nn.Parameter(T)
            if not middle:
                tensors[f"mpo_{k}_start"] = T.clone()
        return tensors


class MatrixProduct(WeightDelta):
    """y = f(x) + x ΔWᵀ with ΔW = T₁ … T_c … Tₙ − T₁⁰ … T_c … Tₙ⁰"""

    def chains(self) -> tuple[list[Tensor], list[Tensor]]:
        """All tensors, and with those that train as they were at the start."""
        keys = [key.partition("@")[0] for key in self.added_keys]
        names = [key for key in keys if not key.endswith("_start")]
        return tuple(  # type: ignore[return-value]
            [self.held(key + ending if key + ending in keys else key) for key in names]
            for ending in ("", "_start")
        )

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.delta().to(x.dtype))

    def delta(self) -> Tensor:
        """ΔW, at least in float32. Shapes: → (out, in)."""
        both = self.chains()
        with unrounded(
            both[0][0]
        ):  # a small difference of two weights: half precision can't tell these apart
            now, start = map(contracted, both)
            return now - start
