"""What a low-rank method needs that merges its change into the weight and starts anew, again and again in one training.

    W ← W + s · B A;   A ← drawn anew,  B ← 0

The function stays the same, and what all changes add up to has a rank as large as the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.parts.added import NO_STEP, step_counter, steps_of
from pefttutor.parts.attachment import Attachment
from pefttutor.parts.freezing import Whole
from pefttutor.parts.linear import stored_as
from pefttutor.parts.lowrank_layer import LowRank, as_in_linear, draw_factors
from pefttutor.parts.lowrank_targets import add_lowrank
from pefttutor.parts.part import of_kind, owners_of_each

__all__ = [
    "Restarting",
    "RestartingAdamW",
    "Rewritten",
    "add_restarting",
    "cut_smallest",
    "merge_due",
    "not_merged",
]


class Restarting(LowRank):
    """A low-rank change that can be written into its layer's weight, to start anew."""

    restarts = True

    @torch.no_grad()
    def restart(self, generator: torch.Generator) -> None:
        """Write the change into the layer's weight, draw A anew, and let B be zero.

        Beside a half-precision weight the sum is rounded to it.
        """
        layer: Any = self.layer
        delta, weight = self.delta(), stored_as(layer, layer.weight)
        layer.weight.copy_(stored_as(layer, weight.to(delta.dtype) + delta))
        A, B = self.factors
        A.copy_(as_in_linear((A.shape[0], A.shape[1]), generator))
        B.zero_()


class Rewritten(Whole):
    """Weights that don't train but are written in training. They belong to what is saved, and `detach` puts them back.

    Raises: ValueError for a weight that nothing can be added to, that another layer shares, or on which something
        else builds.
    """

    def __init__(self, model: nn.Module, parts: Iterable[Restarting]) -> None:
        parts = list(parts)
        for part in parts:
            part.check_foldable()
            changes = list(vars(part.layer)["_changes"].values())
            if not all(change.additive for change in changes[: changes.index(part)]):
                raise ValueError(
                    f"what {changes[0].name!r} makes of {part.path!r} isn't simply added to its weight, and writing "
                    "the weight would change more: attach this one first."
                )
        shared = owners_of_each(model, [part.layer.weight for part in parts])  # type: ignore[misc]
        for part in parts:
            if len(shared[id(part.layer.weight)]) > 1:
                raise ValueError(
                    f"{part.path!r} shares its weight with another layer, for which the merged change isn't meant: "
                    "leave it out of target_modules."
                )
        super().__init__(model, [f"{part.path}.weight" for part in parts])

    def trained(self) -> list[nn.Parameter]:
        return []


def add_restarting(new: Attachment, model: nn.Module, counter: str) -> None:
    """Take in what a method of this kind needs: factors that restart, the weights they are written to, and a count."""
    generator = torch.Generator().manual_seed(new.method.init_seed)
    factors = partial(draw_factors, r=new.method.r, generator=generator)
    add_lowrank(new, model, factors, Restarting, words=False)
    new.add(Rewritten(model, of_kind(new.parts, Restarting)))
    new.add(step_counter(model, counter, new.name))


def merge_due(model: nn.Module, attachment: Attachment, counter: str, every: int) -> None:
    """Count a step, and after every so many merge and restart, each time with other draws."""
    done = steps_of(model, counter, attachment.name)
    done += 1
    if int(done) % every == 0:
        generator = torch.Generator().manual_seed(attachment.method.init_seed + int(done))
        for part in of_kind(attachment.parts, Restarting):
            part.restart(generator)


def not_merged(model: nn.Module, attachment: Attachment, counter: str, field: str) -> str | None:
    """Why nothing was merged, if nothing was. field: of the method, the steps between merges."""
    done, every = int(steps_of(model, counter, attachment.name)), getattr(attachment.method, field)
    if done >= every:
        return None
    why = f"the training had {done} steps: give a smaller one" if done else NO_STEP
    return f"nothing was merged in {field}={every} steps, for {why}"


def cut_smallest(values: Tensor, share: float, *beside: Tensor) -> None:
    """Let this share of the values, the smallest in magnitude, be zero, and so what stands beside them; in place.

    >>> mean, square = torch.tensor([3.0, -1.0, 2.0, -4.0]), torch.tensor([9.0, 9.0, 9.0, 1.0])
    >>> cut_smallest(mean, 0.5, square)
    >>> mean, square
    (tensor([ 3.,  0.,  0., -4.]), tensor([9., 0., 0., 1.]))
    """
    count = round(share * values.numel())
    if count:
        smallest = values.abs().flatten().topk(count, largest=False).indices
        for each in (values, *beside):
            each.copy_(each.flatten().index_fill(0, smallest, 0).view(each.shape))


class RestartingAdamW(torch.optim.AdamW):
    """AdamW that at each restart forgets most of its moments for the factors, and lets its rate rise from zero again.

    counter: how many steps were taken before, which somebody else counts. every: steps between restarts. warmup: steps
    over which the rate rises after one. cut: the share of the factors' moments that becomes zero, the second where the
    first does: a mean without its mean square would be divided by epsilon, and the step be a million times too long.
    """

    def __init__(
        self,
        params: Any,
        *,
        factors: Iterable[Tensor],
        counter: Tensor,
        every: int,
        warmup: int,
        cut: float,
        **how: Any,
    ) -> None:
        super().__init__(params, **how)
        self.factors, self.counter = list(factors), counter
        self.every, self.warmup, self.cut = every, warmup, cut

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        done = int(self.counter)
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = group["lr"] * self.rate_factor(done)
        try:
            loss = super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate
        if (done + 1) % self.every == 0:
            for state in [self.state[factor] for factor in self.factors if factor in self.state]:
                cut_smallest(state["exp_avg"], self.cut, state["exp_avg_sq"])
        return loss

    def rate_factor(self, done: int) -> float:
        """By how much the rate of the next step is smaller: 1/warmup, 2/warmup, …, 1 after a restart."""
        since = done % self.every + 1
        return 1.0 if done < self.every or since >= self.warmup else since / self.warmup
