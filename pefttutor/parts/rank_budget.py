"""What methods share that begin with too many triplets, and take some away until a budget is left: what they are asked
with, the ranks that are left, and whether the budget has come down.

Such a method has init_r, target_r and total_step, and says in `budget` how many triplets all layers have after a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pefttutor.parts.added import NO_STEP
from pefttutor.parts.attachment import Attachment
from pefttutor.parts.part import of_kind
from pefttutor.parts.settings import check_whole
from pefttutor.parts.triplets import KEPT, Triplets

__all__ = ["behind", "check_budget", "check_length", "ranks_of"]


def check_budget(method: Any) -> None:
    """Raise ValueError unless target_r and total_step are whole, and target_r is at most init_r."""
    check_whole(method, "target_r")
    if method.target_r > method.init_r:
        raise ValueError(
            f"target_r is {method.target_r}; it must be at most init_r, {method.init_r}: ranks only go."
        )
    if method.total_step is not None:
        check_whole(method, "total_step")


def check_length(method: Any, around: int) -> None:
    """Raise ValueError unless total_step is more than the steps around the fall, in which the budget stays."""
    if method.total_step <= around:
        raise ValueError(
            f"total_step is {method.total_step}; it must be more than tinit + tfinal, {around}, for the budget shrinks "
            "between them."
        )


def ranks_of(attachments: Iterable[Attachment]) -> dict[str, int]:
    """How many triplets each layer has kept, by its name in the model."""
    parts = [part for attachment in attachments for part in of_kind(attachment.parts, Triplets)]
    return {part.path: int(part.held(KEPT).sum()) for part in parts}


def behind(method: Any, layers: int, done: int, needed: int) -> str | None:
    """What is missing where a training took `done` steps, and the budget has come down after `needed`; else None."""
    if done == 0:
        return f"the budget never moved from {method.init_r * layers} ranks, for {NO_STEP}"
    if done < needed:
        return (
            f"the budget has come to {method.budget(done - 1, layers)} ranks, not to {method.target_r * layers}, for "
            f"the training had {done} of total_step={method.total_step} steps: train on, or give total_step={done}"
        )
    return None
