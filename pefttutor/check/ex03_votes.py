"""Notebook 03's appendix, a vote of prompts: the right answer, and those that learners write instead."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.nn.functional import one_hot

# ---- the reference solution


def vote(logits: Tensor) -> Tensor:
    """The class that most voters name, of equal ones the first.   (voters, batch, classes) → (batch,)."""
    return _counted(logits).argmax(1)


def _counted(logits: Tensor) -> Tensor:
    """How many voters name each class.   (voters, batch, classes) → (batch, classes)."""
    return one_hot(logits.argmax(2), logits.shape[2]).sum(0)


# ---- what learners write instead


def _first_named(logits: Tensor) -> Tensor:
    texts = logits.argmax(2).T.tolist()
    return torch.tensor([Counter(named).most_common(1)[0][0] for named in texts])


def _last_of_equals(logits: Tensor) -> Tensor:
    return logits.shape[2] - 1 - _counted(logits).flip(1).argmax(1)


VOTE_MISTAKES = {
    "the logits are averaged: a loud voter outweighs two quiet ones; each has one vote": lambda logits: (
        logits.mean(0).argmax(1)
    ),
    "the probabilities are averaged: a sure voter outweighs an unsure one; each has one vote": lambda logits: (
        logits.softmax(2).mean(0).argmax(1)
    ),
    "the surest voter decides alone": lambda logits: logits.amax(0).argmax(1),
    "the first voter decides alone": lambda logits: logits[0].argmax(1),
    "the classes' numbers are averaged: between 0 and 2 lies a 1 that nobody named": lambda logits: (
        logits.argmax(2).float().mean(0).round().long()
    ),
    "the middle one of the classes' numbers is taken; classes have no order": lambda logits: (
        logits.argmax(2).median(0).values
    ),
    "how many votes the winner has is given, not which class it is": lambda logits: _counted(logits).amax(1),
    "the votes for each class are given; the class that has most is wanted": _counted,
    "the class with the fewest votes wins": lambda logits: _counted(logits).argmin(1),
    "the texts vote on each voter; the voters shall on each text": lambda logits: (
        logits.argmax(2).mode(1).values
    ),
    "the largest logit is sought among the texts, not among the classes": lambda logits: (
        one_hot(logits.argmax(1), logits.shape[1]).sum(0).argmax(1)
    ),
    "of equal classes the last wins; the first should": _last_of_equals,
    "of equal classes the one named by the earlier voter wins; the first should": _first_named,
}
