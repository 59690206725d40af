"""Notebook 07, proxy-tuning: the sum of logits, three caches; in 07b a model that hides, and two rows in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pefttutor.check.compare import same_result
from pefttutor.check.core import exercise
from pefttutor.check.ex07_answers import (
    STEERED_MISTAKES,
    TOP_MISTAKES,
    TWO_ROW_MISTAKES,
    WRITE_MISTAKES,
    Read,
    steered,
    steered_top,
    two_row_linear,
    write_steered,
)
from pefttutor.check.values import draw


@exercise("07.1", reference=steered)
def ex07_1(attempt: Any) -> None:
    """Logits of a batch; then log-probabilities of one model beside logits of the others, which changes nothing."""
    three = {name: 2 * draw(3, 4, 7, seed=seed) for name, seed in (("own", 1), ("expert", 2), ("anti", 3))}
    for inputs in (three | {"alpha": 0.7}, three | {"own": three["own"].log_softmax(-1), "alpha": 1.6}):
        same_result(attempt, steered, inputs, mistakes=STEERED_MISTAKES)


class _Reader:
    """A small recurrent model that is read as the lesson's are, and counts the tokens that it gets."""

    def __init__(self, seed: int) -> None:
        self.seen = 0
        self.words, self.turn = draw(9, 5, seed=seed), draw(5, 5, seed=seed + 1) / 2
        self.says = 2 * draw(9, 5, seed=seed + 2)

    def __call__(self, tokens: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        state = torch.zeros(len(tokens), 5) if cache is None else cache
        states = []
        for column in tokens.unbind(1):
            state = torch.tanh(state @ self.turn + self.words[column])
            states.append(state)
        self.seen += tokens.numel()
        return torch.stack(states, 1) @ self.says.T, state


@exercise("07.2", reference=write_steered)
def ex07_2(attempt: Any) -> None:
    """What is written, and how many tokens each model has read for it."""
    for seed, alpha in ((40, 0.6), (160, 1.5)):
        inputs = {
            "models": [_Reader(seed), _Reader(seed + 5), _Reader(seed + 10)],
            "tokens": torch.randint(9, (2, 4), generator=torch.Generator().manual_seed(seed)),
            "alpha": alpha,
            "steps": 6,
        }
        known = {name: _with_reading(mistake) for name, mistake in WRITE_MISTAKES.items()}
        same_result(_with_reading(attempt), _with_reading(write_steered), inputs, mistakes=known)


def _with_reading(write: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """What a loop writes, and how many tokens M, M⁺ and M⁻ got."""

    def both(models: Sequence[_Reader], tokens: Tensor, alpha: float, steps: int) -> dict[str, Any]:
        functions: list[Read] = list(models)
        written = write(models=functions, tokens=tokens, alpha=alpha, steps=steps)
        return {"written": written, "tokens read": [model.seen for model in models]}

    return both


@exercise("07.3", reference=steered_top)
def ex07_3(attempt: Any) -> None:
    """Other tokens are shown for each text, and not in the vocabulary's order."""
    for k, alpha in ((3, 0.7), (4, 1.6)):
        own = (2 * draw(2, 8, seed=70 + k)).log_softmax(-1)
        shown, ids = own.topk(k)
        inputs = {
            "shown": shown,
            "ids": ids,
            "expert": 2 * draw(2, 8, seed=80 + k),
            "anti": 2 * draw(2, 8, seed=90 + k),
            "alpha": alpha,
        }
        same_result(attempt, steered_top, inputs, mistakes=TOP_MISTAKES)


@exercise("07.4", reference=two_row_linear)
def ex07_4(attempt: Any) -> None:
    """As many tokens as rows, so that a mark along the wrong axis is no error of shapes."""
    for on in ((1.0, 0.0, 1.0, 0.0), (0.0, 0.0, 1.0, 1.0)):
        inputs = {
            "x": draw(4, 4, 5, seed=101),
            "weight": draw(7, 5, seed=102),
            "lora_A": draw(3, 5, seed=103),
            "lora_B": draw(7, 3, seed=104),
            "scaling": 1.5,
            "on": torch.tensor(on),
        }
        same_result(
            attempt, two_row_linear, inputs, gradients=("lora_A", "lora_B"), mistakes=TWO_ROW_MISTAKES
        )
