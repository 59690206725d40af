"""Train chosen entries of a tensor: their gradients, their optimizer state, and nothing of the others.

    w_i ← AdamW(w_i, g_i)   for the chosen i;        w_j is never written   for the others

A mask multiplied onto a dense gradient doesn't do this. Momentum moves entries that were chosen once, weight decay
moves all of them, and gradient and state stay as large as the model. Here the k chosen entries of a tensor are a
vector of their own, and torch's optimizer sees only that vector. Why it is lean:

- gradient, both moments and the update have k entries, whatever the size of the tensor;
- gathering and scattering read and write k places (see `chosen` for what an index is);
- `selected` lets autograd deliver the k gradients; a dense one exists for one tensor at a time, in its backward.

Time falls less than p: a processor reads 64 bytes for an entry of 4, so that at p = .1 four of five lines of memory
come along. A tensor's entries are gathered again only if somebody else has changed the tensor since the last step.
`python -m pefttutor.bench sparse` measures a step against torch's fused AdamW with a masked gradient, and against six
lines of stock torch that train such vectors without any of the checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.kernels import threads
from pefttutor.kernels.flat_entries import put, read, selected, sorted_places, write

__all__ = ["SparseAdamW", "SparseSGD", "read", "selected", "sparse_adamw_reference", "write"]

WAYS = {"fused", "foreach", "differentiable"}  # torch's settings for how it makes a step
FUSED = ("cpu", "cuda")  # where torch (2.11) has a fused one


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

    >>> weight, grad, zeros, mask = torch.ones(2), torch.ones(2), torch.zeros(2), torch.tensor([True, False])
    >>> sparse_adamw_reference(weight, grad, mask, zeros, zeros.clone(), 1, lr=0.25, weight_decay=0)
    tensor([0.7500, 1.0000])

    Shapes: all of the weight's; exp_avg and exp_avg_sq are updated in place, dense. step: t = 1, 2, …
    Source: Loshchilov & Hutter 2019, algorithm 2, restricted to a subset as in chapter eq. 4.6.
    """
    exp_avg.mul_(betas[0]).add_(grad * mask, alpha=1 - betas[0])
    exp_avg_sq.mul_(betas[1]).add_((grad * mask).square(), alpha=1 - betas[1])
    denominator = (exp_avg_sq / (1 - betas[1] ** step)).sqrt() + eps
    moved = weight * (1 - lr * weight_decay) - lr * (exp_avg / (1 - betas[0] ** step)) / denominator
    return torch.where(mask, moved, weight)


@dataclass(eq=False)
class _Part:
    """A tensor's chosen entries, and the vector that an optimizer trains in their place."""

    weight: Tensor
    index: Tensor
    values: nn.Parameter
    written: tuple[int, int] | None = None  # see `_state`

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: of the copy's tensor nobody knows what happens to it."""
        return vars(self) | {"written": None}

    def check(self) -> None:
        now, then = self.weight, self.values
        if now.dtype != then.dtype or now.device != then.device:
            raise ValueError(
                f"a tensor {tuple(now.shape)} is {now.dtype} on {now.device} and was {then.dtype} on {then.device} "
                "when the optimizer was made; make the optimizer after converting the model"
            )

    def gather(self) -> None:
        if self.written is None or self.written != self._state():
            torch.index_select(self.weight.detach().view(-1), 0, self.index, out=self.values.data)
        assert self.weight.grad is not None  # see _OnChosen.step
        self.values.grad = read(self.weight.grad, self.index)

    def scatter(self) -> None:
        put(self.weight, self.index, self.values.data)
        self.values.grad = None
        self.written = self._state()

    def _state(self) -> tuple[int, int] | None:
        """Where the tensor is, and how often autograd has seen it changed (not by `write`, which goes past it)."""
        return None if self.weight.is_inference() else (self.weight.data_ptr(), self.weight._version)


def _checked(pair: Any) -> _Part:
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
    index = sorted_places(index, weight)
    return _Part(weight, index, nn.Parameter(read(weight, index)))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a.to(b.device) == b).all())


class _OnChosen(torch.optim.Optimizer):
    """What makes an optimizer of torch, the next class in line, train the chosen entries alone."""

    def __init__(self, chosen: Iterable[tuple[Tensor, Tensor]], lr: float = 1e-3, **settings: Any) -> None:
        self._parts = [_checked(pair) for pair in chosen]
        if len({id(part.weight) for part in self._parts}) < len(self._parts):
            raise ValueError("a tensor is given twice; give it once, with all of its chosen entries")
        devices = {part.weight.device for part in self._parts}
        if devices and not WAYS & settings.keys():
            # On a GPU in one pass, where torch's usual choice makes a dozen.
            fused = all(device.type in FUSED and threads.short_way(device) for device in devices)
            settings |= {"fused": True} if fused else {}
        super().__init__([part.values for part in self._parts], lr=lr, **settings)  # type: ignore[call-arg]

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle, where torch names what it takes along: the chosen entries come too."""
        return super().__getstate__() | {"_parts": self._parts}

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
        return super().state_dict() | {"index": [part.index for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Take over a state that was saved for the same chosen entries.

        Raises: ValueError if it belongs to other entries; the optimizer is then left as it was.
        """
        own, saved = [part.index for part in self._parts], state_dict.get("index")
        if saved is None or len(saved) != len(own) or not all(map(_same, saved, own)):
            has = "none" if saved is None else [len(index) for index in saved]
            raise ValueError(
                f"the state belongs to other entries: it has an index of {has} and the optimizer, tensor by tensor, "
                f"{[len(index) for index in own]}, expected the same places; make the optimizer with the index that "
                "the state was saved with, or start without a state"
            )
        super().load_state_dict(state_dict)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.check()
        moving = [part for part in self._parts if part.weight.grad is not None]
        for part in moving:
            part.gather()
        inner: Any = super().step
        if getattr(inner, "hooked", False):  # it would run the step hooks once more
            inner = partial(inner.__wrapped__, self)
        inner()
        for part in moving:
            part.scatter()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the tensors whose entries are trained."""
        for part in self._parts:
            part.weight.grad = None


class SparseAdamW(_OnChosen, torch.optim.AdamW):
    """torch's AdamW on chosen entries: k values of each moment, and the other entries are never written.

        optimizer = SparseAdamW([(layer.weight, index)], lr=1e-3)     # layer.weight.grad is read, dense or not

    >>> weight = torch.ones(2)
    >>> weight.grad = torch.tensor([8.0, 8.0])
    >>> SparseAdamW([(weight, torch.tensor([1]))], lr=0.25, weight_decay=0).step()
    >>> weight                                                          # a first step is as long as lr
    tensor([1.0000, 0.7500])

    chosen: pairs of a tensor and the flat places of its chosen entries; the rest as in `torch.optim.AdamW`. With
    everything chosen the result is that of `torch.optim.AdamW`, bit for bit. A tensor without a gradient isn't moved.
    What others change in a tensor is followed, if autograd sees it: not what is written past it, through `tensor.data`.
    To clip, give `clip_grad_norm_` the tensors themselves (their gradients are still dense: those of entries that
    aren't chosen count): in param_groups there are only vectors, without a gradient outside step. NaN in a gradient
    becomes NaN in its entry, as in torch. All tensors share the settings. `GradScaler` finds no gradient to unscale and
    says so; bfloat16 needs none.

    Cost: state 8 bytes a chosen float32 entry (its two moments); dense AdamW has 8 an entry. Beside it the entries
        themselves, 4 bytes each, and during a step their gradients, 4 more.
    Raises: ValueError for an index that isn't one of its tensor, a tensor converted since (step), or a state saved
        for other entries (load_state_dict); NotImplementedError from add_param_group.
    Source: Loshchilov & Hutter 2019, algorithm 2; the subset is chapter eq. 4.6.
    """


class SparseSGD(_OnChosen, torch.optim.SGD):
    """torch's SGD, with momentum and weight decay if asked for, on chosen entries; otherwise as `SparseAdamW`.

    >>> weight = torch.ones(2)
    >>> weight.grad = torch.tensor([8.0, 8.0])
    >>> SparseSGD([(weight, torch.tensor([1]))], lr=0.5).step()
    >>> weight
    tensor([ 1., -3.])
    """
