"""Compacter: adapters whose matrices are sums of Kronecker products, of small matrices that all adapters share.

    W = Σᵢ Aᵢ ⊗ (Sᵢ Tᵢ)          i = 1 … n;  Aᵢ (n, n) shared, Sᵢ (in / n, r) and Tᵢ (r, out / n) each adapter's own

Aᵢ ⊗ B puts a multiple of B in the place of every entry of Aᵢ. So an adapter learns a few vectors, and all adapters
learn together, in n³ values, how these are laid out in a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.adapter_places import adapter_places, check_narrow
from pefttutor.parts.added import Shared
from pefttutor.parts.bottleneck import ACTIVATIONS, Bottleneck, width_of
from pefttutor.parts.freezing import fully_trained, train_fully
from pefttutor.parts.norms import norm_parameters
from pefttutor.parts.settings import check_choice, check_names, check_number, check_whole
from pefttutor.parts.weight_delta import beside

__all__ = ["Compacter"]

RULE = "compacter_A"


@dataclass(frozen=True, kw_only=True)
class Compacter:
    """Bottleneck adapters of parameterized hypercomplex multiplication layers (PHM), with a shared rule.

    h ← h + σ(h W_d + b_d) W_u + b_u,   W_d = Σᵢ Aᵢ ⊗ (Sᵢ Tᵢ) (d, m),  W_u likewise (m, d);  i = 1 … n

    >>> model = nn.ModuleDict({"down_proj": nn.Linear(40, 24)})
    >>> Compacter(bottleneck=8, target_modules=("down_proj",)).count(model)    # 2 · (24 + 8) and 8 + 24; once 4³
    160

    placement: "houlsby" (after every sublayer: Compacter) or "pfeiffer" (after the feed-forward: Compacter++).
    bottleneck: the features m in the middle. n: how many products are summed, and the size of A; it must divide the
        width d and m. r: the rank of Sᵢ Tᵢ. activation: σ: gelu, relu, silu or tanh.
    target_modules: as in Adapter. In an encoder-decoder the authors adapt no attention over the encoder's output: for
        T5 they mean ("SelfAttention.o", "wo").
    train_norms: whether the model's norms train too, as the authors do it.
    modules_to_save: modules that train fully and are saved along, such as a new head ("classifier").
    init_std: A is drawn from N(0, init_std²), S and T Glorot-uniform, biases are 0. With the authors' 1e-4 the model
        starts very near the base and not exactly there: what an adapter adds is a product of two such matrices.
    init_seed: fixes the random weights, whatever the device.

    A lies in the model itself and serves both matrices of all adapters. (The authors' code takes GELU's approximation
    by tanh.)

    Shapes: A (n, n, n); S_d (n, d / n, r), T_d (n, r, m / n), b_d (m), S_u (n, m / n, r), T_u (n, r, d / n), b_u (d).
    Cost: it trains 2·r·(d + m) + d + m values an adapter, and n³ once (`count`). Each call makes the matrices, of 2·m·d
        values, and then takes 4·m·d FLOPs a token, as an Adapter; it can't be merged.
    Raises: ValueError for what n doesn't divide, a name that finds nothing, a bottleneck above the width, or a model
        whose sublayers aren't found.
    Source: Karimi Mahabadi et al. 2021, arXiv:2106.04647, eq. 5 to 8; PHM: Zhang et al. 2021, arXiv:2102.08597.
    """

    placement: str = "houlsby"
    bottleneck: int = 24
    n: int = 4
    r: int = 1
    activation: str = "gelu"
    target_modules: str | Collection[str] | None = None
    train_norms: bool = False
    modules_to_save: Collection[str] = ()
    init_std: float = 1e-4
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self, "placement", ("houlsby", "pfeiffer"))
        for name in ("bottleneck", "n", "r"):
            check_whole(self, name)
        check_choice(self, "activation", tuple(ACTIVATIONS))
        check_choice(self, "train_norms", (True, False))
        check_number(self, "init_std", above=0)
        check_whole(self, "init_seed", least=0)
        check_names(self, "target_modules", "modules_to_save")
        if self.bottleneck % self.n:
            raise ValueError(
                f"bottleneck is {self.bottleneck} and n is {self.n}; n must divide it, such as bottleneck={6 * self.n}."
            )

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, put the adapters and their rule A in, and return it.

        Raises: ValueError if the name is in use or a layer can't be adapted. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            generator = torch.Generator().manual_seed(self.init_seed)
            fully = train_fully(model, self._norms(model), self.modules_to_save)
            places = self._places(model)
            rule = torch.empty(self.n, self.n, self.n, device="cpu").normal_(
                0, self.init_std, generator=generator
            )
            placed = beside(next(iter(places.values())), {RULE: nn.Parameter(rule)})
            shared = Shared(model, name, placed)
            new.add(shared)
            for path, layer in places.items():
                drawn = self._drawn(width_of(layer), generator)
                new.add(Hypercomplex(path, layer, name, drawn, activation=self.activation, shared=shared))
            for part in fully:
                new.add(part)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: Σ (2·r·(d + m) + d + m), n³, the norms', and modules_to_save."""
        m, widths = self.bottleneck, [width_of(layer) for layer in self._places(model).values()]
        names = {*self._norms(model), *fully_trained(model, self.modules_to_save)[0]}
        own = sum((2 * self.r + 1) * (d + m) for d in widths)
        return own + self.n**3 + sum(model.get_parameter(n).numel() for n in names)

    def _places(self, model: nn.Module) -> dict[str, nn.Module]:
        layers = adapter_places(model, self.placement, self.target_modules, self.modules_to_save)
        for path, layer in layers.items():
            if width_of(layer) % self.n:
                raise ValueError(
                    f"n is {self.n}, and {path!r} gives {width_of(layer)} features: n must divide them."
                )
        check_narrow(layers, self.bottleneck)
        return layers

    def _norms(self, model: nn.Module) -> list[str]:
        return norm_parameters(model) if self.train_norms else []

    def _drawn(self, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        """S and T of both matrices, uniform in ± √(6 / (rows + columns)) as Glorot's, and biases of zero."""
        drawn: dict[str, Tensor] = {}
        for which, n_in, n_out in (("down", width, self.bottleneck), ("up", self.bottleneck, width)):
            for key, rows, columns in (("S", n_in // self.n, self.r), ("T", self.r, n_out // self.n)):
                bound = math.sqrt(6 / (rows + columns))
                factor = torch.empty(self.n, rows, columns, device="cpu")
                drawn[f"compacter_{which}_{key}"] = factor.uniform_(-bound, bound, generator=generator)
            drawn[f"compacter_{which}_bias"] = torch.zeros(n_out, device="cpu")
        return drawn


class Hypercomplex(Bottleneck):
    """A bottleneck adapter whose projections are made of its own S and T, and of the A of all of them."""

    makes = True

    def __init__(
        self,
        path: str,
        layer: nn.Module,
        name: str,
        tensors: Mapping[str, Tensor],
        *,
        shared: Shared,
        **how: Any,
    ) -> None:
        """shared: A."""
        super().__init__(path, layer, name, tensors, **how)
        self.shared = shared

    @property
    def rule(self) -> Tensor:
        """A (n, n, n)."""
        return self.shared.get(RULE, device=self.trained()[0].device)[0]

    def projections(self) -> list[Tensor]:
        S_d, T_d, down_bias, S_u, T_u, up_bias = self.trained()
        return [_summed(self.rule, S_d @ T_d).t(), down_bias, _summed(self.rule, S_u @ T_u).t(), up_bias]

    def trace(self, layer: nn.Module, x: Any, tape: Any, kind: str) -> Any:
        """What an adapter keeps, and Sᵢ Tᵢ of both matrices, which the products' gradients need."""
        y = super().trace(layer, x, tape, kind)
        if y is not None and tape.trains(self.rule, *self.trained()):
            for S, T in (self.trained()[:2], self.trained()[3:5]):
                tape.save(x.like(rows=len(S) * S.shape[1], width=T.shape[2], itemsize=S.element_size()), kind)
        return y


def _summed(A: Tensor, B: Tensor) -> Tensor:
    """Σᵢ Aᵢ ⊗ Bᵢ. Shapes: (n, a, b), (n, p, q) → (a · p, b · q)."""
    return torch.einsum("iab,ipq->apbq", A, B).flatten(2).flatten(0, 1)
