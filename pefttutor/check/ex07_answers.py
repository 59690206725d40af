"""Notebook 07: the right answers, and those that learners write instead, each with its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Read = Callable[[Tensor, Any], tuple[Tensor, Any]]

# ---- the reference solutions


def steered(own: Tensor, expert: Tensor, anti: Tensor, alpha: float) -> Tensor:
    """log softmax(s_M + α (s_M⁺ − s_M⁻)).   (…, vocabulary) each; logits or log-probabilities."""
    return (own + alpha * (expert - anti)).log_softmax(-1)


def write_steered(models: Sequence[Read], tokens: Tensor, alpha: float, steps: int) -> Tensor:
    """The likeliest tokens by M, M⁺ and M⁻ together, each of which reads every token once.   → (batch, steps)"""
    new, written = tokens, []
    caches: list[Any] = [None] * len(models)
    for _ in range(steps):
        said = []
        for i, read in enumerate(models):
            logits, caches[i] = read(new, caches[i])
            said.append(logits[:, -1])
        new = steered(said[0], said[1], said[2], alpha).argmax(-1, keepdim=True)
        written.append(new)
    return torch.cat(written, 1)


def steered_top(shown: Tensor, ids: Tensor, expert: Tensor, anti: Tensor, alpha: float) -> Tensor:
    """The same where M shows k log-probabilities: −∞ for all that it hides.   (batch, k) → (batch, vocabulary)"""
    moved = shown + alpha * (expert - anti).gather(-1, ids)
    hidden = torch.full_like(expert, -torch.inf)
    return hidden.scatter(-1, ids, moved.log_softmax(-1))


def two_row_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, on: Tensor
) -> Tensor:
    """x Wᵀ, and s x Aᵀ Bᵀ added in the rows that are on.   x (rows, tokens, in), on (rows) → (rows, tokens, out)"""
    return x @ weight.T + scaling * on[:, None, None] * (x @ lora_A.T @ lora_B.T)


# ---- what learners write instead


def _mixed(change: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> Callable[..., Tensor]:
    return lambda own, expert, anti, alpha: change(own, expert, anti, alpha)


STEERED_MISTAKES = {
    "expert and anti-expert are exchanged: M⁺ is added, M⁻ is taken away": lambda own, expert, anti, alpha: (
        steered(own, anti, expert, alpha)
    ),
    "the sum isn't normalised: log_softmax makes log-probabilities of it": _mixed(
        lambda own, expert, anti, alpha: own + alpha * (expert - anti)
    ),
    "these are probabilities; their logarithm is wanted": _mixed(
        lambda own, expert, anti, alpha: steered(own, expert, anti, alpha).exp()
    ),
    "probabilities are added; the sum is one of logits": _mixed(
        lambda own, expert, anti, alpha: (
            own.softmax(-1) + alpha * (expert.softmax(-1) - anti.softmax(-1))
        ).log_softmax(-1)
    ),
    "α weighs the expert alone; it weighs the difference": _mixed(
        lambda own, expert, anti, alpha: (own + alpha * expert - anti).log_softmax(-1)
    ),
    "the anti-expert is forgotten": _mixed(
        lambda own, expert, anti, alpha: steered(own, expert, 0 * anti, alpha)
    ),
    "M is forgotten: this is the difference alone": _mixed(
        lambda own, expert, anti, alpha: steered(0 * own, expert, anti, alpha)
    ),
    "α is forgotten": _mixed(lambda own, expert, anti, alpha: steered(own, expert, anti, 1.0)),
    "M is weighed by 1 − α; the formula leaves it whole": _mixed(
        lambda own, expert, anti, alpha: steered((1 - alpha) * own, expert, anti, alpha)
    ),
    "the expert's difference to M is added; it is that to M⁻": _mixed(
        lambda own, expert, anti, alpha: steered(own, expert, own, alpha)
    ),
    "normalised along the wrong axis: the vocabulary is the last": _mixed(
        lambda own, expert, anti, alpha: (own + alpha * (expert - anti)).log_softmax(0)
    ),
}


def _loop(
    *,
    choose: Callable[[list[Tensor], float], Tensor] = lambda said, alpha: steered(
        said[0], said[1], said[2], alpha
    ).argmax(-1, keepdim=True),
    place: int = -1,
    cached: bool = True,
    forward: bool = True,
    shared: bool = False,
    whole: bool = False,
    prompt: bool = False,
    more: int = 0,
) -> Callable[..., Tensor]:
    def wrong_loop(models: Sequence[Read], tokens: Tensor, alpha: float, steps: int) -> Tensor:
        new, text = tokens, tokens
        caches: list[Any] = [None] * len(models)
        for _ in range(steps + more):
            said = []
            for i, read in enumerate(models):
                k = 0 if shared else i
                logits, after = read(new, caches[k] if cached else None)
                caches[k] = after if forward or caches[k] is None else caches[k]
                said.append(logits[:, place])
            new = choose(said, alpha)
            text = torch.cat([text, new], 1)
            new = text if whole or not cached else new
        return text if prompt else text[:, tokens.shape[1] :]

    return wrong_loop


def _each_its_own(models: Sequence[Read], tokens: Tensor, alpha: float, steps: int) -> Tensor:
    news, written = [tokens] * len(models), []
    caches: list[Any] = [None] * len(models)
    for _ in range(steps):
        said = []
        for i, read in enumerate(models):
            logits, caches[i] = read(news[i], caches[i])
            said.append(logits[:, -1])
        written.append(steered(said[0], said[1], said[2], alpha).argmax(-1, keepdim=True))
        news = [s.argmax(-1, keepdim=True) for s in said]
    return torch.cat(written, 1)


WRITE_MISTAKES = {
    "the text is read anew for each token: give only the new token, and the cache": _loop(cached=False),
    "the whole text is given although the cache holds its beginning": _loop(whole=True),
    "the three models share one cache; each needs its own": _loop(shared=True),
    "the caches of the first call are used again: keep those that each call returns": _loop(forward=False),
    "each model goes on with a token of its own choice; all must read the one that was chosen": _each_its_own,
    "M alone chooses": _loop(choose=lambda said, alpha: said[0].argmax(-1, keepdim=True)),
    "the expert alone chooses": _loop(choose=lambda said, alpha: said[1].argmax(-1, keepdim=True)),
    "expert and anti-expert are exchanged: the order is M, M⁺, M⁻": _loop(
        choose=lambda said, alpha: steered(said[0], said[2], said[1], alpha).argmax(-1, keepdim=True)
    ),
    "the least likely token is chosen": _loop(
        choose=lambda said, alpha: steered(said[0], said[1], said[2], alpha).argmin(-1, keepdim=True)
    ),
    "the first place's logits choose; the last place's tell what comes next": _loop(place=0),
    "the prompt is returned, too; only the new tokens are wanted": _loop(prompt=True),
    "one token too many": _loop(more=1),
    "one token too few: the prompt's last place already says the first": _loop(more=-1),
    "α is forgotten": _loop(
        choose=lambda said, alpha: steered(said[0], said[1], said[2], 1.0).argmax(-1, keepdim=True)
    ),
}


def _shown(
    *,
    move: Callable[
        [Tensor, Tensor, Tensor, Tensor, float], Tensor
    ] = lambda shown, ids, expert, anti, alpha: shown + alpha * (expert - anti).gather(-1, ids),
    hidden: float = -torch.inf,
    normalise: Callable[[Tensor], Tensor] = lambda moved: moved.log_softmax(-1),
    last: Callable[[Tensor], Tensor] = lambda found: found,
) -> Callable[..., Tensor]:
    def wrong_top(shown: Tensor, ids: Tensor, expert: Tensor, anti: Tensor, alpha: float) -> Tensor:
        moved = normalise(move(shown, ids, expert, anti, alpha))
        return last(torch.full_like(expert, hidden).scatter(-1, ids, moved))

    return wrong_top


TOP_MISTAKES = {
    "a hidden token has log-probability 0, which is probability 1; −∞ is none": _shown(hidden=0.0),
    "hidden tokens are moved, too; M shows nothing of them, so they are out": lambda shown, ids, expert, anti, alpha: (
        (alpha * (expert - anti)).scatter_add(-1, ids, shown).log_softmax(-1)
    ),
    "the sum isn't normalised over the shown tokens": _shown(normalise=lambda moved: moved),
    "these are probabilities; their logarithm is wanted": _shown(last=torch.exp),
    "the first k tokens' differences are taken; `ids` says which tokens are shown": _shown(
        move=lambda shown, ids, expert, anti, alpha: shown + alpha * (expert - anti)[:, : ids.shape[1]]
    ),
    "the k values stand at the first k tokens; `ids` says where": lambda shown, ids, expert, anti, alpha: (
        torch.full_like(expert, -torch.inf).scatter(
            -1,
            torch.arange(ids.shape[1]).expand_as(ids),
            (shown + alpha * (expert - anti).gather(-1, ids)).log_softmax(-1),
        )
    ),
    "expert and anti-expert are exchanged": _shown(
        move=lambda shown, ids, expert, anti, alpha: shown + alpha * (anti - expert).gather(-1, ids)
    ),
    "the anti-expert is forgotten": _shown(
        move=lambda shown, ids, expert, anti, alpha: shown + alpha * expert.gather(-1, ids)
    ),
    "α is forgotten": _shown(
        move=lambda shown, ids, expert, anti, alpha: shown + (expert - anti).gather(-1, ids)
    ),
    "what M shows is forgotten": _shown(
        move=lambda shown, ids, expert, anti, alpha: alpha * (expert - anti).gather(-1, ids)
    ),
    "log-probabilities are multiplied; they are added": _shown(
        move=lambda shown, ids, expert, anti, alpha: shown * alpha * (expert - anti).gather(-1, ids)
    ),
    "this has k entries a text; one a token of the vocabulary is wanted": lambda shown, ids, expert, anti, alpha: (
        (shown + alpha * (expert - anti).gather(-1, ids)).log_softmax(-1)
    ),
}


def _rows(
    value: Callable[[Tensor, Tensor, Tensor, Tensor, float, Tensor], Tensor],
) -> Callable[..., Tensor]:
    return lambda x, weight, lora_A, lora_B, scaling, on: value(
        x, weight, lora_A, lora_B, scaling, on[:, None, None]
    )


TWO_ROW_MISTAKES = {
    "the change is added in every row": _rows(lambda x, W, A, B, s, on: x @ W.T + s * (x @ A.T @ B.T)),
    "the change is added in no row": _rows(lambda x, W, A, B, s, on: x @ W.T + 0 * s * (x @ A.T @ B.T)),
    "the rows are exchanged: the change belongs where `on` is 1": _rows(
        lambda x, W, A, B, s, on: x @ W.T + s * (1 - on) * (x @ A.T @ B.T)
    ),
    "rows that are off lose W, too": _rows(lambda x, W, A, B, s, on: on * (x @ W.T + s * (x @ A.T @ B.T))),
    "W is left out of the rows that are on": _rows(
        lambda x, W, A, B, s, on: (1 - on) * (x @ W.T) + s * on * (x @ A.T @ B.T)
    ),
    "the scaling is forgotten": _rows(lambda x, W, A, B, s, on: x @ W.T + on * (x @ A.T @ B.T)),
    "W is scaled, too": _rows(lambda x, W, A, B, s, on: s * (x @ W.T + on * (x @ A.T @ B.T))),
    "`on` marks tokens instead of rows": lambda x, weight, lora_A, lora_B, scaling, on: (
        x @ weight.T + scaling * on[: x.shape[1], None] * (x @ lora_A.T @ lora_B.T)
    ),
    "`on` marks outputs instead of rows": lambda x, weight, lora_A, lora_B, scaling, on: (
        x @ weight.T + scaling * torch.cat([on, on])[: len(weight)] * (x @ lora_A.T @ lora_B.T)
    ),
    "only the first token gets the change": _rows(
        lambda x, W, A, B, s, on: (
            x @ W.T + s * on * (torch.arange(x.shape[1]) == 0)[:, None] * (x @ A.T @ B.T)
        )
    ),
    "the change is taken away": _rows(lambda x, W, A, B, s, on: x @ W.T - s * on * (x @ A.T @ B.T)),
}
