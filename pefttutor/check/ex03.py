"""Notebook 03, prompt tuning: a prompt before a batch, a start as labels, a prompt for each text, and a vote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pefttutor.check.compare import same_result
from pefttutor.check.core import exercise
from pefttutor.check.ex03_answers import (
    IGNORED,
    MIXED_MISTAKES,
    PROMPT_MISTAKES,
    START_MISTAKES,
    label_start,
    mixed_batch,
    with_prompt,
)
from pefttutor.check.ex03_votes import VOTE_MISTAKES, vote
from pefttutor.check.values import draw


def _mask(*lengths: int) -> Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


@exercise("03.1", reference=with_prompt)
def ex03_1(attempt: Any) -> None:
    """Texts longer and shorter than the prompt, padded, with answers at their ends; and the prompt's gradient."""
    for count, lengths in ((3, (5, 4)), (6, (2, 4, 3))):
        mask = _mask(*lengths)
        answer = torch.arange(mask.shape[1]) == torch.tensor(lengths)[:, None] - 1
        inputs = {
            "prompt": draw(count, 7, seed=1),
            "embeds": draw(*mask.shape, 7, seed=2),
            "mask": mask,
            "labels": torch.where(answer, torch.arange(11, 11 + len(lengths))[:, None], IGNORED),
        }
        same_result(
            _ordered(attempt),
            _ordered(with_prompt),
            inputs,
            gradients=("prompt",),
            mistakes={name: _ordered(mistake) for name, mistake in PROMPT_MISTAKES.items()},
        )


@exercise("03.2", reference=label_start)
def ex03_2(attempt: Any) -> None:
    """Labels of one, two and three pieces, with drawn words behind them, and more labels than rows."""
    inputs: dict[str, Any] = {
        "table": draw(9, 4, seed=3),
        "labels": [[5], [2, 7, 1], [8, 3]],
        "drawn": [6, 0, 4],
        "count": 5,
    }
    for count in (5, 2):
        inputs |= {"count": count}
        same_result(attempt, label_start, inputs, gradients=("table",), mistakes=START_MISTAKES)


@exercise("03.3", reference=mixed_batch)
def ex03_3(attempt: Any) -> None:
    """Prompts of three lengths, the longest not the first, in two orders; whatever stands where nobody reads."""
    for task in ([2, 0, 1, 0], [1, 1, 2, 0]):
        mask = _mask(3, 5, 4, 2)
        inputs = {
            "prompt_0": draw(2, 6, seed=4),
            "prompt_1": draw(4, 6, seed=5),
            "prompt_2": draw(3, 6, seed=6),
            "task": torch.tensor(task),
            "embeds": draw(*mask.shape, 6, seed=7),
            "mask": mask,
        }
        same_result(
            _read(attempt),
            _read(mixed_batch),
            inputs,
            gradients=("prompt_0", "prompt_1"),
            mistakes={name: _read(mistake) for name, mistake in MIXED_MISTAKES.items()},
        )


@exercise("03.4", reference=vote)
def ex03_4(attempt: Any) -> None:
    """Five voters, the first loud and the last quiet, and four, who are often two against two."""
    for voters, texts, classes in ((5, 20, 4), (4, 9, 6)):
        loud = torch.linspace(4, 0.5, voters)[:, None, None]
        same_result(
            attempt,
            vote,
            {"logits": loud * draw(voters, texts, classes, seed=voters)},
            mistakes=VOTE_MISTAKES,
        )


def _ordered(function: Callable[..., Any]) -> Callable[..., Any]:
    """What `function` gives, its names in one order."""

    def sorted_by_name(**inputs: Any) -> Any:
        came = function(**inputs)
        return dict(sorted(came.items())) if isinstance(came, dict) else came

    return sorted_by_name


def _read(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with zeros at the places that the mask leaves out: nothing there is looked at."""
    ordered = _ordered(function)

    def seen(**inputs: Any) -> Any:
        prompts = [inputs.pop(f"prompt_{i}") for i in range(3)]
        came = ordered(prompts=prompts, **inputs)
        try:
            read = came["attention_mask"] != 0
            embeds, positions = came["inputs_embeds"] * read[..., None], came["position_ids"] * read
        except (KeyError, TypeError, RuntimeError, IndexError):
            return came  # not of the form that is wanted: the comparison says so
        return came | {"inputs_embeds": embeds, "position_ids": positions}

    return seen
