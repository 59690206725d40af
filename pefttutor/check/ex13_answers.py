"""Notebook 13: the right answers, and those that learners write instead, each with its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# ---- the reference solutions


def restarted(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, s: float, new_A: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """W + s · B A, the new A, and a B of zeros: the function stays the same."""
    return weight + s * lora_B @ lora_A, new_A.clone(), torch.zeros_like(lora_B)


def cut_moment(moment: Tensor, share: float) -> Tensor:
    """The moment with this share of its values, the smallest in magnitude, set to zero."""
    smallest = moment.abs().flatten().argsort()[: round(share * moment.numel())]
    return moment.flatten().index_fill(0, smallest, 0.0).view_as(moment)


def mora_branch(x: Tensor, M: Tensor, n_out: int) -> Tensor:
    """decompress(M compress(x)), type 1          x (…, in), M (r̂, r̂) → (…, out)."""
    width, n_in = len(M), x.shape[-1]
    filled = torch.cat([x, x[..., : -n_in % width]], -1)
    answer = filled.unflatten(-1, (-1, width)).sum(-2) @ M.T
    return torch.cat([answer] * -(-n_out // width), -1)[..., :n_out]


def melora_branch(x: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """s · x_i A_iᵀ B_iᵀ for each of n shares x_i          A (n, r, in/n), B (n, out/n, r) → (…, out)."""
    shares = x.chunk(len(A), dim=-1)
    return s * torch.cat([x_i @ A_i.T @ B_i.T for x_i, A_i, B_i in zip(shares, A, B, strict=True)], -1)


# ---- what learners write instead


def _restart(
    *,
    weight: Callable[..., Tensor] = lambda W, A, B, s, new: W + s * B @ A,
    A: Callable[[Tensor, Tensor], Tensor] = lambda old, new: new,
    B: Callable[[Tensor], Tensor] = torch.zeros_like,
) -> Callable[..., Any]:
    def wrong_restart(weight_: Tensor, lora_A: Tensor, lora_B: Tensor, s: float, new_A: Tensor) -> Any:
        return weight(weight_, lora_A, lora_B, s, new_A), A(lora_A, new_A), B(lora_B)

    return lambda weight, lora_A, lora_B, s, new_A: wrong_restart(weight, lora_A, lora_B, s, new_A)


def _restart_in_place(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, s: float, new_A: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    weight += s * lora_B @ lora_A
    return weight, new_A, torch.zeros_like(lora_B)


def _zeroed_first(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, s: float, new_A: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return weight, new_A, torch.zeros_like(lora_B)


RESTART_MISTAKES: dict[str, Callable[..., Any]] = {
    "the factor s is missing": _restart(weight=lambda W, A, B, s, new: W + B @ A),
    "s counts twice": _restart(weight=lambda W, A, B, s, new: W + s * s * B @ A),
    "the change is subtracted: that unlearns it twice": _restart(
        weight=lambda W, A, B, s, new: W - s * B @ A
    ),
    "nothing is merged, and what B A had learnt is lost: merge before B becomes zero": _zeroed_first,
    "the new A is merged; what was learnt is in the old one": _restart(
        weight=lambda W, A, B, s, new: W + s * B @ new
    ),
    "this is s · B A alone: the old weight is missing": _restart(weight=lambda W, A, B, s, new: s * B @ A),
    "B stays: W has the change already, and with the new A it would be changed once more": _restart(
        B=lambda B: B.clone()
    ),
    "A stays: the next B A would lie in the rows of the old one, and no rank be won": _restart(
        A=lambda old, new: old.clone()
    ),
    "both factors are zero: each one's gradient contains the other, so nothing would ever learn": _restart(
        A=lambda old, new: torch.zeros_like(old)
    ),
    "the new A is added to the old one": _restart(A=lambda old, new: old + new),
    "B becomes ones; zero keeps the function": _restart(B=torch.ones_like),
    "the weight is changed in place (+=, add_): return a new one": _restart_in_place,
    "the order is W, A, B": lambda weight, lora_A, lora_B, s, new_A: (
        weight + s * lora_B @ lora_A,
        torch.zeros_like(lora_B),
        new_A,
    ),
}


def _cut(
    *,
    order: Callable[[Tensor], Tensor] = lambda flat: flat.abs(),
    count: Callable[[float, int], int] = lambda share, n: round(share * n),
    scale: Callable[[float], float] = lambda share: 1.0,
    last: bool = False,
) -> Callable[..., Tensor]:
    def wrong_cut(moment: Tensor, share: float) -> Tensor:
        flat = moment.flatten()
        chosen = order(flat).argsort(descending=last)[: count(share, flat.numel())]
        return flat.index_fill(0, chosen, 0.0).view_as(moment) * scale(share)

    return wrong_cut


def _cut_in_place(moment: Tensor, share: float) -> Tensor:
    return moment.copy_(cut_moment(moment, share))


def _cut_rows(moment: Tensor, share: float) -> Tensor:
    """Each row by itself, the first more than the last, as a share of a row rounds."""
    rows = moment if moment.ndim > 1 else moment[:, None]
    return torch.stack([cut_moment(row, share) for row in rows]).view_as(moment)


CUT_MISTAKES: dict[str, Callable[..., Any]] = {
    "the largest values are cut; they are the ones to keep": _cut(last=True),
    "this share is kept; it is the share to cut": _cut(count=lambda share, n: n - round(share * n)),
    "values are ordered with their sign: the smallest in magnitude go (.abs())": _cut(
        order=lambda flat: flat
    ),
    "share is taken as a threshold for the magnitude; it is a share of the values": (
        lambda moment, share: torch.where(moment.abs() < share, 0.0, moment)
    ),
    "share of the largest value is taken as a threshold; it is a share of the values": (
        lambda moment, share: torch.where(moment.abs() < share * moment.abs().max(), 0.0, moment)
    ),
    "what is kept is enlarged by 1/(1 − share), as dropout does": _cut(
        scale=lambda share: 1 / (1 - share) if share < 1 else 1.0
    ),
    "all of it is cut, whatever the share": lambda moment, share: torch.zeros_like(moment),
    "nothing is cut": lambda moment, share: moment.clone(),
    "this multiplies by 1 − share; the values that are kept stay as they are": (
        lambda moment, share: moment * (1 - share)
    ),
    "this is the mask; multiply the moment by it": lambda moment, share: (cut_moment(moment, share) != 0).to(
        moment.dtype
    ),
    "the magnitudes are returned: the signs of the moment are lost": lambda moment, share: (
        cut_moment(moment, share).abs() + 0.0
    ),
    "each row is cut by itself; the share is of all values of the moment": _cut_rows,
    "the first values are cut, not the smallest": _cut(order=lambda flat: torch.arange(flat.numel())),
    "the moment is changed in place (mul_, index_fill_, m[…] = 0): return a new one": _cut_in_place,
}


def _mora(
    *,
    filled: Callable[[Tensor, int], Tensor] = lambda x, short: torch.cat([x, x[..., :short]], -1),
    grouped: Callable[[Tensor, int], Tensor] = lambda x, width: x.unflatten(-1, (-1, width)).sum(-2),
    times: Callable[[Tensor, Tensor], Tensor] = lambda groups, M: groups @ M.T,
    spread: Callable[[Tensor, int], Tensor] = lambda y, copies: torch.cat([y] * copies, -1),
) -> Callable[..., Tensor]:
    def wrong_mora(x: Tensor, M: Tensor, n_out: int) -> Tensor:
        width = len(M)
        answer = times(grouped(filled(x, -x.shape[-1] % width), width), M)
        return spread(answer, -(-n_out // width))[..., :n_out]

    return wrong_mora


def _only_first(y: Tensor, copies: int) -> Tensor:
    return F.pad(y, (0, (copies - 1) * y.shape[-1]))


MORA_MISTAKES: dict[str, Callable[..., Any]] = {
    "the last group is filled up with zeros; it is filled up from the front of x": _mora(
        filled=lambda x, short: F.pad(x, (0, short))
    ),
    "the last group is filled up from the end of x; take its front": _mora(
        filled=lambda x, short: torch.cat([x, x[..., x.shape[-1] - short :]], -1)
    ),
    "what doesn't fill a group is dropped": _mora(
        filled=lambda x, short: x,
        grouped=lambda x, width: x[..., : x.shape[-1] // width * width].unflatten(-1, (-1, width)).sum(-2),
    ),
    "groups are averaged; type 1 adds them up": _mora(
        grouped=lambda x, width: x.unflatten(-1, (-1, width)).mean(-2)
    ),
    "neighbours are added up; a group is r̂ features in a row, and groups are added": _mora(
        grouped=lambda x, width: x.unflatten(-1, (width, -1)).sum(-1)
    ),
    "only the first group is used": _mora(grouped=lambda x, width: x[..., :width]),
    "M is transposed: M h for every token is h @ M.T": _mora(times=lambda groups, M: groups @ M),
    "each number of the answer is repeated in place; repeat the whole answer, one copy after the other": _mora(
        spread=lambda y, copies: y.repeat_interleave(copies, dim=-1)
    ),
    "only the first r̂ outputs get the answer; it is repeated up to out": _mora(spread=_only_first),
    "the answer is divided among its copies": _mora(
        spread=lambda y, copies: torch.cat([y / copies] * copies, -1)
    ),
    "this is the compressed x: M is missing": _mora(times=lambda groups, M: groups + 0 * M.sum()),
    "M is cut off from the graph (.data or .detach())": _mora(times=lambda groups, M: groups @ M.detach().T),
    "x is cut off from the graph: layers below would learn nothing": lambda x, M, n_out: mora_branch(
        x.detach(), M, n_out
    ),
    "the answer isn't repeated up to out": lambda x, M, n_out: mora_branch(x, M, len(M)),
}


def _melora(
    *,
    split: Callable[[Tensor, int], list[Tensor]] = lambda x, n: list(x.chunk(n, dim=-1)),
    joined: Callable[[list[Tensor]], Tensor] = lambda parts: torch.cat(parts, -1),
    factor: Callable[[float, int], float] = lambda s, n: s,
) -> Callable[..., Tensor]:
    def wrong_melora(x: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        parts = [x_i @ A_i.T @ B_i.T for x_i, A_i, B_i in zip(split(x, len(A)), A, B, strict=True)]
        return factor(s, len(A)) * joined(parts)

    return wrong_melora


def _one_for_all(x: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """The n blocks side by side as one LoRA: every output share sees every input share."""
    return s * x @ torch.cat(list(A), -1).T @ torch.cat(list(B), 0).T


def _last_dim(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts, -1).flatten(-2)


MELORA_MISTAKES: dict[str, Callable[..., Any]] = {
    "the factor s is missing": _melora(factor=lambda s, n: 1.0),
    "s is divided by the number of blocks": _melora(factor=lambda s, n: s / n),
    "s counts twice": _melora(factor=lambda s, n: s * s),
    "the factors are joined to one LoRA of rank r: each block must see its own share of x alone": _one_for_all,
    "every n-th feature goes to a block; a share is in/n features in a row": _melora(
        split=lambda x, n: [x[..., i::n] for i in range(n)]
    ),
    "the outputs are interleaved; the shares come one after the other": _melora(joined=_last_dim),
    "the shares of x come in the opposite order": _melora(split=lambda x, n: list(x.chunk(n, dim=-1))[::-1]),
    "the blocks' outputs come in the opposite order": _melora(
        joined=lambda parts: torch.cat(parts[::-1], -1)
    ),
    "all blocks see the first share of x": _melora(split=lambda x, n: [x.chunk(n, dim=-1)[0]] * n),
    "the blocks' outputs are added up; they are shares of the output": _melora(
        joined=lambda parts: torch.stack(parts).sum(0)
    ),
    "all blocks use the first B": lambda x, A, B, s: melora_branch(x, A, B[:1].expand_as(B), s),
    "all blocks use the first A": lambda x, A, B, s: melora_branch(x, A[:1].expand_as(A), B, s),
    "A is cut off from the graph (.data or .detach())": lambda x, A, B, s: melora_branch(x, A.detach(), B, s),
    "B is cut off from the graph (.data or .detach())": lambda x, A, B, s: melora_branch(x, A, B.detach(), s),
    "x is cut off from the graph: layers below would learn nothing": lambda x, A, B, s: melora_branch(
        x.detach(), A, B, s
    ),
}
