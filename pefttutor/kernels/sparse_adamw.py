"""Train chosen entries of a tensor: their gradients, their optimizer state, and nothing of the others.

    w_i ← AdamW(w_i, g_i)   for the chosen i;        w_j is never written   for the others

A mask multiplied onto a dense gradient doesn't do this. Momentum moves entries that were chosen once, weight decay
moves all of them, and gradient and state stay as large as the model. Here the k chosen entries of a tensor are a
vector of their own, and torch's optimizer sees only that vector. Why it is lean:

- gradient, both moments and the update have k entries, whatever the size of the tensor;
- gathering and scattering read and write k places (see `chosen` for what an index is);
- `selected` lets autograd deliver the k gradients; a dense one exists for one tensor at a time, in its backward.

Time is another matter: gathering and scattering run on one thread and jump through memory. On two quiet cores a step at
p = .3, .1, .005 took 1.20, .90 and .27 of torch's fused AdamW with a masked gradient (`python -m pefttutor.bench`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.kernels.chosen import read, selected, sorted_places, write

__all__ = ["SparseAdamW", "SparseSGD", "read", "selected", "sparse_adamw_reference", "write"]


def sparse_adamw_reference(
    weight: Tensor,
    grad: Tensor,
    mask: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Tensor:
    """One step of AdamW on the entries where `mask` is true, as the formula says; returns the new weight.

    m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²,  w ← (1 − lr·λ)w − lr · (m / (1−β₁ᵗ)) / (√(v / (1−β₂ᵗ)) + ε)

    Shapes: all of the weight's; exp_avg and exp_avg_sq are updated in place, dense. step: t = 1, 2, …
    Source: Loshchilov & Hutter 2019, algorithm 2, restricted to a subset as in chapter eq. 4.6.
    """
    exp_avg.mul_(betas[0]).add_(grad * mask, alpha=1 - betas[0])
    exp_avg_sq.mul_(betas[1]).add_((grad * mask).square(), alpha=1 - betas[1])
    denominator = (exp_avg_sq / (1 - betas[1] ** step)).sqrt() + eps
    moved = weight * (1 - lr * weight_decay) - lr * (exp_avg / (1 - betas[0] ** step)) / denominator
    return torch.where(mask, moved, weight)


class _Chosen:
    """The chosen entries of some tensors, and the vectors that an optimizer trains in their place."""

    def __init__(self, chosen: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.pairs = [_checked(item) for item in chosen]
        if len({id(weight) for weight, _ in self.pairs}) < len(self.pairs):
            raise ValueError("a tensor is given twice; give it once, with all of its chosen entries")
        self.values = [nn.Parameter(read(weight, index)) for weight, index in self.pairs]

    def gather(self) -> None:
        for (weight, index), values in zip(self.pairs, self.values, strict=True):
            if weight.dtype != values.dtype or weight.device != values.device:
                raise ValueError(
                    f"a tensor {tuple(weight.shape)} is {weight.dtype} on {weight.device} and was {values.dtype} on "
                    f"{values.device} when the optimizer was made; make the optimizer after converting the model"
                )
            torch.index_select(weight.detach().view(-1), 0, index, out=values.data)
            values.grad = None if weight.grad is None else read(weight.grad, index)

    def scatter(self) -> None:
        for (weight, index), values in zip(self.pairs, self.values, strict=True):
            if values.grad is not None:
                write(weight, index, values)
                values.grad = None

    def zero_grad(self) -> None:
        for weight, _ in self.pairs:
            weight.grad = None


def _checked(pair: Any) -> tuple[Tensor, Tensor]:
    """Raise unless this is a tensor and places of it, each once; they get sorted: that reads memory in order."""
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair)):
        raise ValueError(
            f"a {type(pair).__name__} is given, expected pairs (tensor, index of its chosen entries); all have the "
            "same settings: for parameter groups make an optimizer for each"
        )
    weight, index = pair
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"an index is {tuple(index.shape)} of {index.dtype}, expected the flat places (k) as int32 or int64; "
            "of a boolean mask that is mask.flatten().nonzero().squeeze(1)"
        )
    if not weight.is_contiguous():
        raise ValueError(f"a tensor {tuple(weight.shape)} isn't contiguous; call contiguous() first")
    return weight, sorted_places(index, weight)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a.to(b.device) == b).all())


class _OnChosen(torch.optim.Optimizer):
    """What makes an optimizer of torch, the next class in line, train the chosen entries alone."""

    def __init__(self, chosen: Iterable[tuple[Tensor, Tensor]], lr: float = 1e-3, **settings: Any) -> None:
        self._chosen = _Chosen(chosen)
        super().__init__(self._chosen.values, lr=lr, **settings)  # type: ignore[call-arg]

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle, where torch names what it takes along: the chosen entries come too."""
        return super().__getstate__() | {"_chosen": self._chosen}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused, but for the one group that the constructor makes: an optimizer trains what it was made for.

        Raises: NotImplementedError.
        """
        if self.param_groups:
            raise NotImplementedError(
                f"{type(self).__name__} takes all tensors and their chosen entries when it is made; make another "
                "optimizer for more of them"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """torch's, and under "index" the places that the state belongs to."""
        return super().state_dict() | {"index": [index for _, index in self._chosen.pairs]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Take over a state that was saved for the same chosen entries.

        Raises: ValueError if it belongs to other entries; the optimizer is then left as it was.
        """
        own, saved = [index for _, index in self._chosen.pairs], state_dict.get("index")
        if saved is None or len(saved) != len(own) or not all(map(_same, saved, own)):
            has = "none" if saved is None else [len(index) for index in saved]
            raise ValueError(
                f"the state belongs to other entries: it has an index of {has} and the optimizer, by tensor, "
                f"{[len(index) for index in own]}, expected the same places; make the optimizer with the index that "
                "the state was saved with, or start without a state"
            )
        super().load_state_dict(state_dict)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._chosen.gather()
        inner: Any = super().step  # type: ignore[misc]
        if getattr(inner, "hooked", False):  # it would run the step hooks once more
            inner = partial(inner.__wrapped__, self)
        inner()
        self._chosen.scatter()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the tensors whose entries are trained."""
        self._chosen.zero_grad()


class SparseAdamW(_OnChosen, torch.optim.AdamW):
    """torch's AdamW on chosen entries: k values of each moment, and the other entries are never written.

        optimizer = SparseAdamW([(layer.weight, index)], lr=1e-3)     # layer.weight.grad is read, dense or not

    chosen: pairs of a tensor and the flat places of its chosen entries; the rest as in `torch.optim.AdamW`. With
    everything chosen the result is that of `torch.optim.AdamW`, bit for bit. A tensor without a gradient isn't moved.
    To clip, give `clip_grad_norm_` the tensors themselves (their gradients are still dense: those of entries that
    aren't chosen count): in param_groups there are only vectors, without a gradient outside step. NaN in a gradient
    becomes NaN in its entry, as in torch. All tensors share the settings.

    Cost: state 8 bytes a chosen float32 entry (its two moments); dense AdamW has 8 an entry.
    Raises: ValueError for an index that isn't one of its tensor, a tensor converted since (step), or a state saved
        for other entries (load_state_dict); NotImplementedError from add_param_group.
    Source: Loshchilov & Hutter 2019, algorithm 2; the subset is chapter eq. 4.6.
    """


class SparseSGD(_OnChosen, torch.optim.SGD):
    """torch's SGD, with momentum and weight decay if asked for, on chosen entries; otherwise as `SparseAdamW`."""
