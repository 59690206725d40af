"""The singular values of what a method changed, ΔW = U diag(σ) Vᵀ, layer by layer, and the model with fewer of them.

Data only; `pefttutor.widgets.ranks` draws it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.parts.weight_delta import WeightDelta

# What a method can say about one layer: ΔW itself, or the factors (B, A, s) of ΔW = s·B·A.
Delta = Tensor | tuple[Tensor, Tensor, float]


@dataclass(frozen=True)
class Update:
    """ΔW = U diag(sigma) Vh of one layer, in float64 on the CPU.

    >>> Update(torch.eye(2), torch.tensor([2.0, 1.0]), torch.eye(2)).matrix(1)
    tensor([[2., 0.],
            [0., 0.]])

    Shapes: U (out, n), sigma (n,) descending, Vh (n, in), with n the number of directions ΔW can have: r for LoRA.
    """

    U: Tensor
    sigma: Tensor
    Vh: Tensor

    def matrix(
        self, k: int | None = None, *, rows: slice = slice(None), columns: slice = slice(None)
    ) -> Tensor:
        """The best approximation of ΔW with k directions (Eckart-Young); all of them when k is None."""
        return (self.U[rows, :k] * self.sigma[:k]) @ self.Vh[:k, columns]

    def kept(self, k: int) -> float:
        """The share of ‖ΔW‖²_F that the k leading directions hold: Σ_{i≤k} σ_i² / Σ σ_i²; it is 1 when ΔW = 0."""
        total = self.sigma.square().sum()
        return float(self.sigma[:k].square().sum() / total) if total > 0 else 1.0


def effective_rank(sigma: Tensor) -> float:
    """How many directions ΔW uses, counted by the entropy of its singular values; 0 when ΔW = 0.

    erank(ΔW) = exp(−Σ_i p_i ln p_i),  p_i = σ_i / Σ_j σ_j.   It is k when k singular values are equal and the rest 0.

    >>> effective_rank(torch.tensor([3.0, 3.0, 0.0, 0.0]))
    2.0

    Source: Roy and Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007, definition 1.
    """
    total = sigma.sum()
    return float(torch.special.entr(sigma / total).sum().exp()) if total > 0 else 0.0


def stable_rank(sigma: Tensor) -> float:
    """How many directions ΔW uses, counted by energy; 0 when ΔW = 0. Small singular values hardly move it.

    srank(ΔW) = ‖ΔW‖²_F / ‖ΔW‖²_2 = Σ_i σ_i² / σ_1².   srank ≤ rank.

    >>> stable_rank(torch.tensor([2.0, 1.0, 1.0]))
    1.5

    Source: Rudelson and Vershynin, Sampling from large matrices, J. ACM 54(4), 2007 (there "numerical rank").
    """
    largest = sigma.max()
    return float((sigma / largest).square().sum()) if largest > 0 else 0.0


def decompose(delta: Delta) -> Update:
    """The thin singular value decomposition of ΔW; of s·B·A through the QR of both factors, never out × in.

    B = Q_B R_B,  Aᵀ = Q_A R_A,  s R_B R_Aᵀ = U' diag(σ) V'ᵀ   ⇒   U = Q_B U',  V = Q_A V'.

    >>> B, A = torch.ones(8, 2), torch.ones(2, 6)
    >>> decompose((B, A, 0.5)).U.shape                                  # at most r = 2 directions
    torch.Size([8, 2])

    Shapes: B (out, r), A (r, in) → U (out, r), sigma (r), Vh (r, in).
    Cost: (out + in)·r² for factors; out·in·min(out, in) for a dense ΔW.
    """
    if isinstance(delta, Tensor):
        return Update(*torch.linalg.svd(_exact(delta), full_matrices=False))
    B, A, scaling = delta
    Q_B, R_B = torch.linalg.qr(_exact(B))  # (out, r), (r, r)
    Q_A, R_A = torch.linalg.qr(_exact(A).T)  # (in, r), (r, r)
    U, sigma, Vh = torch.linalg.svd(float(scaling) * R_B @ R_A.T, full_matrices=False)
    return Update(Q_B @ U, sigma, Vh @ Q_A.T)


def updates(source: Any, *, base: Any = None, modules: Sequence[str] | None = None) -> dict[str, Update]:
    """Decompose every ΔW of `source`, as {layer name: Update}. A snapshot: later training isn't seen.

    source:  a model with adapted layers; or a mapping {layer name: ΔW or (B, A, s)}, so that any method can be shown;
             or, with `base`, the model (or its state dict) after training.
    base:    the model or state dict before training: then ΔW = after − before of every matrix that changed.
    modules: only layers with these names, or whose dotted name ends in one of them.

    >>> by_layer = updates({"q_proj": torch.diag(torch.tensor([1.0, 3.0]))})
    >>> by_layer["q_proj"].sigma.tolist()
    [3.0, 1.0]

    Raises: ValueError when nothing is adapted, a name is unknown, a ΔW isn't finite, or before and after don't match.
    """
    deltas = _deltas(source, base)
    if modules is not None:
        for wanted in modules:
            if not any(_named(name, wanted) for name in deltas):
                raise ValueError(f"modules: no adapted layer is called {wanted!r}; there are {list(deltas)}")
        deltas = {name: delta for name, delta in deltas.items() if any(_named(name, m) for m in modules)}
    for name, delta in deltas.items():
        _check(name, delta)
    return {name: decompose(delta) for name, delta in deltas.items()}


@contextlib.contextmanager
def truncated(model: nn.Module, found: Mapping[str, Update], k: int) -> Iterator[nn.Module]:
    """Inside the block every ΔW of `found` keeps its k leading directions; afterwards every bit is as it was.

    A layer with factors gets A' = Vh[:k], B' = U[:, :k] diag(σ) / s, the rest zero; another layer gets
    W − Σ_{i>k} σ_i u_i v_iᵀ. Parameters stay the same objects: their storage is exchanged, and put back also after an
    exception. A layer that has no more than k directions is left alone.

    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> with truncated(model, updates({"0": model[0].weight}), k=1):
    ...     int(torch.linalg.matrix_rank(model[0].weight))
    1
    """
    changed: list[tuple[Tensor, Tensor]] = []

    def exchange(parameter: Tensor, value: Tensor) -> None:
        changed.append((parameter, parameter.data))
        parameter.data = value.to(parameter.device, parameter.dtype)

    try:
        for name, update in found.items():
            if k >= len(update.sigma) or not update.sigma.any():
                continue
            layer: Any = model.get_submodule(name)
            factors = _factors(layer)
            if isinstance(factors, Tensor):
                raise ValueError(f"{name} has no factors that could be exchanged: look at its update alone")
            if factors is not None:
                _refuse_merged(name, layer)
                lora_B, lora_A, scaling = factors
                A, B = torch.zeros_like(lora_A.data), torch.zeros_like(lora_B.data)
                A[:k] = update.Vh[:k]
                B[:, :k] = update.U[:, :k] * (update.sigma[:k] / scaling)
                exchange(lora_A, A)
                exchange(lora_B, B)
            else:
                dropped = (update.U[:, k:] * update.sigma[k:]) @ update.Vh[k:]
                exchange(layer.weight, _exact(layer.weight) - dropped)
        yield model
    finally:
        for parameter, original in reversed(changed):
            parameter.data = original


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _named(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith("." + wanted)


def _modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return model.named_modules()


def _low_rank(layer: Any) -> Any:
    """What the attached method has changed in this layer: the one added change that acts on it, or None.

    Raises: ValueError if several do.
    """
    changes = [c for c in vars(layer).get("_changes", {}).values() if isinstance(c, WeightDelta) and c.on]
    if len(changes) > 1:
        names = ", ".join(repr(change.name) for change in changes)
        raise ValueError(
            f"a layer is changed by {names}: switch all but one off to look at it, pefttutor.switch(model, …)"
        )
    return changes[0] if changes else None


def _factors(layer: Any) -> Delta | None:
    """(B, A, s) of a layer that a method has changed, ΔW if they are made of more, or of one of the learner's own."""
    change = _low_rank(layer)
    if change is not None:
        return (*change.factors[::-1], change.scaling) if change.stored else change.delta()
    if all(isinstance(getattr(layer, name, None), Tensor) for name in ("lora_A", "lora_B")):
        return layer.lora_B, layer.lora_A, layer.scaling
    return None


def _refuse_merged(name: str, layer: Any) -> None:
    change = _low_rank(layer)
    if getattr(layer, "merged", False) or (change is not None and change.folded):
        raise ValueError(f"{name} is merged, its factors no longer act; unmerge the model, then truncate it")


def _deltas(source: Any, base: Any) -> dict[str, Delta]:
    if base is not None:
        return _differences(base, source)
    if isinstance(source, Mapping):
        if not source:
            raise ValueError("the mapping is empty; expected {layer name: ΔW or (B, A, s)}")
        return dict(source)
    if not isinstance(source, nn.Module):
        kind = type(source).__name__
        raise TypeError(f"expected a model or a mapping {{layer name: ΔW or (B, A, s)}}, got {kind}")
    factors = {name: _factors(layer) for name, layer in _modules(source)}
    deltas: dict[str, Delta] = {name: factor for name, factor in factors.items() if factor is not None}
    if not deltas:
        raise ValueError(
            f"no adapted layer in {type(source).__name__}: attach a method first, e.g. "
            "pefttutor.LoRA(r=8).attach(model); after full fine-tuning, give the model of before as base="
        )
    return deltas


def _differences(before: Any, after: Any) -> dict[str, Delta]:
    old, new = _matrices(before), _matrices(after)
    if old.keys() != new.keys():
        unmatched = sorted(old.keys() ^ new.keys())
        raise ValueError(f"before and after don't have the same matrices: {unmatched[:4]} are in one only")
    for name in old:
        if old[name].shape != new[name].shape:
            shapes = f"{tuple(old[name].shape)} before and {tuple(new[name].shape)} after"
            raise ValueError(f"{name} has shape {shapes}; expected one model before and after training")
    differences = {name: _exact(new[name]) - _exact(old[name]) for name in old}
    changed: dict[str, Delta] = {name: delta for name, delta in differences.items() if delta.any()}
    if not changed:
        raise ValueError("before and after are equal; base= wants a copy.deepcopy made before training")
    return changed


def _matrices(source: Any) -> dict[str, Tensor]:
    named = source.named_parameters() if isinstance(source, nn.Module) else source.items()
    parts = [(*name.rpartition(".")[::2], tensor) for name, tensor in named]
    return {module: tensor for module, kind, tensor in parts if kind == "weight" and tensor.ndim == 2}


def _check(name: str, delta: Delta) -> None:
    parts = (delta,) if isinstance(delta, Tensor) else delta[:2]
    if any(part.ndim != 2 for part in parts) or (len(parts) == 2 and parts[0].shape[1] != parts[1].shape[0]):
        shapes = " and ".join(str(tuple(part.shape)) for part in parts)
        raise ValueError(f"{name}: expected ΔW (out, in) or B (out, r) and A (r, in), got {shapes}")
    finite = all(bool(part.isfinite().all()) for part in parts)
    if not finite or (not isinstance(delta, Tensor) and not math.isfinite(delta[2])):
        raise ValueError(f"{name}: ΔW holds NaN or infinity; the training diverged (try a smaller lr)")
