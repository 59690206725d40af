"""Notebook 24: the right answers, and those that learners write instead, each with its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Difference = Mapping[str, tuple[Tensor, Tensor]]
LEAST = 3  # examples that choose, however few there are

# ---- the reference solutions


def lottery_difference(start: Weights, first: Weights, second: Weights, k: int) -> dict[str, Tensor]:
    """φ = θ₂ − θ₀ at the k entries whose |θ₁ − θ₀| is largest over all tensors together, 0 elsewhere."""
    moved = torch.cat([(first[name] - start[name]).abs().flatten() for name in start])
    mask = torch.zeros(len(moved), dtype=torch.bool)
    mask[moved.argsort(descending=True)[:k]] = True
    parts = mask.split([weight.numel() for weight in start.values()])
    return {
        name: (second[name] - start[name]) * part.view(start[name].shape)
        for name, part in zip(start, parts, strict=True)
    }


def hard_fisher(losses: Tensor, gradients: Sequence[Weights], share: float, most: int) -> dict[str, Tensor]:
    """Σ_s g_s² over the examples with the largest loss: min(most, ⌊share · n⌋) of n, but at least 3.   (n) losses."""
    count = max(LEAST, min(most, int(share * len(losses))))
    # Each gradient is asked for once: in the lesson it costs a backward pass.
    hardest = [gradients[s] for s in losses.argsort(descending=True)[:count].tolist()]
    return {name: torch.stack([g[name].square() for g in hardest]).sum(0) for name in hardest[0]}


def composed(start: Weights, differences: Sequence[Difference]) -> dict[str, Tensor]:
    """θ₀ + φ_1 + φ_2 + …, each φ as (flat places, changes) of some tensors; θ₀ stays as it is."""
    result = {name: weight.clone() for name, weight in start.items()}
    for phi in differences:
        for name, (places, changes) in phi.items():
            result[name].view(-1)[places] += changes
    return result


# ---- what learners write instead


def _lottery(
    *,
    score: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda zero, one, two: (one - zero).abs(),
    change: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda zero, one, two: two - zero,
    together: bool = True,
    largest: bool = True,
    masked: bool = True,
) -> Callable[..., dict[str, Tensor]]:
    def wrong_difference(start: Weights, first: Weights, second: Weights, k: int) -> dict[str, Tensor]:
        differences: dict[str, Tensor] = {}
        for group in [list(start)] if together else [[name] for name in start]:
            scores = [score(start[name], first[name], second[name]).flatten() for name in group]
            flat = torch.cat(scores)
            mask = torch.zeros(len(flat), dtype=torch.bool)
            mask[flat.argsort(descending=largest)[:k]] = True
            for name, part in zip(group, mask.split([len(s) for s in scores]), strict=True):
                phi = change(start[name], first[name], second[name])
                differences[name] = phi * part.view(phi.shape) if masked else phi
        return differences

    return wrong_difference


def _where_chosen(start: Weights, first: Weights, second: Weights, k: int) -> dict[str, Tensor]:
    return {name: phi for name, phi in lottery_difference(start, first, second, k).items() if phi.any()}


LOTTERY_MISTAKES = {
    "φ is taken from the first training, θ₁ − θ₀; the second one is what is kept": _lottery(
        change=lambda zero, one, two: one - zero
    ),
    "φ is θ₂ − θ₁: without rewinding. It starts from θ₀": _lottery(change=lambda zero, one, two: two - one),
    "these are the trained values; the difference to θ₀ is wanted": _lottery(
        change=lambda zero, one, two: two
    ),
    "the sign of φ is turned: θ₂ − θ₀": _lottery(change=lambda zero, one, two: zero - two),
    "nothing is cut: outside of the k entries φ is 0": _lottery(masked=False),
    "these entries moved least": _lottery(largest=False),
    "without the absolute value, entries that fell come last": _lottery(
        score=lambda zero, one, two: one - zero
    ),
    "chosen by the size of θ₁, not by how far it has moved": _lottery(score=lambda zero, one, two: one.abs()),
    "chosen by the relative change; the change itself is ranked": _lottery(
        score=lambda zero, one, two: ((one - zero) / zero).abs()
    ),
    "chosen by the second training; the first one chooses": _lottery(
        score=lambda zero, one, two: (two - zero).abs()
    ),
    "k entries of each tensor; k of all together is wanted": _lottery(together=False),
    "a tensor in which nothing is chosen is missing; its φ is all zeros": _where_chosen,
}


def _hard(
    *,
    count: Callable[[float, int, int], int] = lambda share, most, n: max(LEAST, min(most, int(share * n))),
    order: Callable[[Tensor], Tensor] = lambda losses: losses.argsort(descending=True),
    score: Callable[[Tensor], Tensor] = lambda g: g.square().sum(0),
) -> Callable[..., dict[str, Tensor]]:
    def wrong_fisher(
        losses: Tensor, gradients: Sequence[Weights], share: float, most: int
    ) -> dict[str, Tensor]:
        chosen = order(losses)[: count(share, most, len(losses))].tolist()
        return {
            name: score(torch.stack([gradients[s][name] for s in chosen or [0]]) * bool(chosen))
            for name in gradients[0]
        }

    return wrong_fisher


def _by_loss(losses: Tensor, gradients: Sequence[Weights], share: float, most: int) -> dict[str, Tensor]:
    count = max(LEAST, min(most, int(share * len(losses))))
    hardest = losses.argsort(descending=True)[:count].tolist()
    return {
        name: torch.stack([losses[s] * gradients[s][name].square() for s in hardest]).sum(0)
        for name in gradients[0]
    }


HARD_MISTAKES = {
    "these examples are the easiest: the largest losses choose": _hard(order=torch.argsort),
    "the first examples are taken, not the hardest": _hard(order=lambda losses: torch.arange(len(losses))),
    "all examples choose: this is FISH": _hard(count=lambda share, most, n: n),
    "summed first, then squared: examples that disagree would cancel": _hard(
        score=lambda g: g.sum(0).square()
    ),
    "absolute gradients instead of their squares": _hard(score=lambda g: g.abs().sum(0)),
    "the squares are missing": _hard(score=lambda g: g.sum(0)),
    "this is the mean over the hardest; the formula sums (the ranking is the same)": _hard(
        score=lambda g: g.square().mean(0)
    ),
    "the squares are weighted by the loss; the loss only decides who chooses": _by_loss,
    "`most` is forgotten": _hard(count=lambda share, most, n: max(LEAST, int(share * n))),
    "min and max are exchanged: `most` is an upper limit": _hard(
        count=lambda share, most, n: max(LEAST, most, int(share * n))
    ),
    "`share` is forgotten: `most` is only a limit": _hard(count=lambda share, most, n: max(LEAST, most + 1)),
    "share · n is rounded up; it is cut": _hard(
        count=lambda share, most, n: max(LEAST, min(most, math.ceil(share * n)))
    ),
    "at least three examples choose, however small share · n is": _hard(
        count=lambda share, most, n: min(most, int(share * n))
    ),
}


def _composed(
    put: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> Callable[..., dict[str, Tensor]]:
    """put(what stands there, what stood there in θ₀, the change, whether it was changed before) → what is put there."""

    def wrong_sum(start: Weights, differences: Sequence[Difference]) -> dict[str, Tensor]:
        result = {name: weight.clone() for name, weight in start.items()}
        touched = {name: torch.zeros(weight.numel(), dtype=torch.bool) for name, weight in start.items()}
        for phi in differences:
            for name, (places, changes) in phi.items():
                flat, before = result[name].view(-1), start[name].reshape(-1)[places]
                flat[places] = put(flat[places], before, changes, touched[name][places])
                touched[name][places] = True
        return result

    return wrong_sum


def _in_place(start: Weights, differences: Sequence[Difference]) -> dict[str, Tensor]:
    for phi in differences:
        for name, (places, changes) in phi.items():
            start[name].view(-1)[places] += changes
    return dict(start)


def _kept(
    keep: Callable[[str, Sequence[Difference]], bool], *, drop: bool
) -> Callable[..., dict[str, Tensor]]:
    """Tensors that aren't kept are dropped from the result, or stay as they were in θ₀."""

    def wrong_sum(start: Weights, differences: Sequence[Difference]) -> dict[str, Tensor]:
        right = composed(start, differences)
        result = {name: right[name] if keep(name, differences) else weight for name, weight in start.items()}
        return {name: w for name, w in result.items() if not drop or keep(name, differences)}

    return wrong_sum


def _every_tensor_of_each(start: Weights, differences: Sequence[Difference]) -> dict[str, Tensor]:
    return composed(start, [{name: phi[name] for name in start} for phi in differences])


def _each_of_every_tensor(start: Weights, differences: Sequence[Difference]) -> dict[str, Tensor]:
    by_tensor = {name: [phi[name] for phi in differences] for name in start}
    return composed(start, [{name: pair} for name, pairs in by_tensor.items() for pair in pairs])


COMPOSED_MISTAKES = {
    "θ₀ itself is changed; the result must be new tensors": _in_place,
    "where two differences share a place, the later one overwrites the earlier": _composed(
        lambda there, before, change, touched: before + change
    ),
    "where two differences share a place, only the first counts": _composed(
        lambda there, before, change, touched: torch.where(touched, there, there + change)
    ),
    "the changes are put in θ₀'s place instead of being added": _composed(
        lambda there, before, change, touched: change
    ),
    "θ₀ is added again with each difference": _composed(
        lambda there, before, change, touched: there + before + change
    ),
    "the changes are subtracted": _composed(lambda there, before, change, touched: there - change),
    "this is the mean of the differences; their sum is wanted": lambda start, differences: composed(
        start,
        [{n: (p, c / len(differences)) for n, (p, c) in phi.items()} for phi in differences],
    ),
    "only the first difference is added": lambda start, differences: composed(start, differences[:1]),
    "θ₀ is left out: this is the sum of the differences alone": lambda start, differences: composed(
        {name: torch.zeros_like(weight) for name, weight in start.items()}, differences
    ),
    "tensors without a difference are missing; they stay as they were": _kept(
        lambda name, differences: any(name in phi for phi in differences), drop=True
    ),
    "a tensor that only some of the differences have is left unchanged": _kept(
        lambda name, differences: all(name in phi for phi in differences), drop=False
    ),
    "a difference needn't have every tensor: go through its own, phi.items(), not through θ₀'s": (
        _every_tensor_of_each
    ),
    "not every difference has every tensor: ask whether the name is in it": _each_of_every_tensor,
    "the tensors have lost their shape": lambda start, differences: {
        name: weight.flatten() for name, weight in composed(start, differences).items()
    },
}
