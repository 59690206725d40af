"""`evaluate`: loss and accuracy of a model on a data set, without training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pefttutor.data.batches import Collate, Loss, collator
from pefttutor.data.checks import check_counts, check_examples
from pefttutor.data.targets import IGNORED, aligned, count_targets, predicts_next
from pefttutor.data.trial import evaluating, fresh_casts

__all__ = ["evaluate", "evaluating"]


@torch.no_grad()
def evaluate(
    model: Any,
    data: Sequence[Any],
    *,
    batch_size: int = 64,
    collate: Collate | None = None,
    loss: Loss | None = None,
) -> dict[str, float]:
    """Mean loss over all labels, and accuracy: the share of labels (tokens or classes) with the largest logit.

    With several yes-or-no labels a text, accuracy is the share of labels with the right sign. A regression has none,
    nor has a loss that compares whole sequences. Labels of −100 count in neither. With `loss` given, only the loss is
    measured. Each module's mode is kept.

    >>> from pefttutor.data import encode; from pefttutor.models import load
    >>> model, tokenizer = load("campus-nano", head="classification", num_labels=2)
    >>> _ = torch.nn.init.zeros_(model.score.weight)         # all logits are 0: log 2, and class 0 for every text
    >>> texts = encode([{"text": "fine", "label": 0}, {"text": "dull", "label": 1}], tokenizer)
    >>> {name: round(value, 3) for name, value in evaluate(model, texts).items()}
    {'loss': 0.693, 'accuracy': 0.5}

    Cost: one forward an example; similar lengths share a batch, so little is spent on padding.
    Raises: ValueError for an empty data set, a batch_size below 1, bad labels, or if no label counts.
    """
    check_counts(batch_size=batch_size)
    check_examples(model, data, "data", needs_labels=loss is None)
    stack, device = collate or collator(model), next(model.parameters()).device
    order = sorted(range(len(data)), key=lambda i: len(data[i].get("input_ids", ())))
    summed, targets = 0.0, 0
    judged: list[tuple[int, int] | None] = []
    with evaluating(model), fresh_casts():
        for start in range(0, len(order), batch_size):
            batch = stack([data[i] for i in order[start : start + batch_size]])
            batch = {key: value.to(device) for key, value in batch.items()}
            shifted = predicts_next(model, batch)
            count = count_targets(batch, shifted=shifted)
            if not count:
                continue  # the mean over nothing is NaN, and would be the mean over all
            targets += count
            if loss is not None:
                summed += loss(model, batch).item() * count
                continue
            output = model(**batch)
            summed += output.loss.item() * count
            judged.append(_right(model, getattr(output, "logits", None), batch["labels"], shifted))
    if not targets:
        raise ValueError(f"nothing can be measured: no label of data counts, all are {IGNORED}")
    found = {"loss": summed / targets}
    if judged and None not in judged:
        right, all_of_them = (sum(numbers) for numbers in zip(*judged, strict=True))  # type: ignore[misc]
        found["accuracy"] = right / all_of_them
    return found


def _right(model: Any, logits: Any, labels: Tensor, shifted: bool) -> tuple[int, int] | None:
    """How many answers are right, and of how many; None where no answer is simply right or wrong."""
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if not isinstance(logits, Tensor) or problem == "regression" or logits.shape[-1] == 1:
        return None
    if labels.is_floating_point():
        if labels.ndim != 2 or logits.shape != labels.shape:
            return None
        return int(((logits > 0) == (labels > 0.5)).sum()), labels.numel()
    if labels.ndim > 1 and not shifted and logits.shape[:-1] != labels.shape:
        return None
    logits, labels = aligned(logits, labels, shifted=shifted)
    counted = labels != IGNORED
    return int(((logits.argmax(-1) == labels) & counted).sum()), int(counted.sum())
