"""`evaluate`: loss and accuracy of a model on a data set, without training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.data.batches import IGNORED, Collate, Loss, collator, count_targets, predicts_next
from pefttutor.data.checks import check_examples


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block every module is in evaluation mode; after it each has its own mode back, even on an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


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

    Labels of −100 count in neither. With `loss` given, only the loss is measured. Each module's mode is kept.

    Cost: one forward an example; similar lengths share a batch, so little is spent on padding.
    Raises: ValueError for an empty data set or bad labels.
    """
    check_examples(model, data, "data", needs_labels=loss is None)
    stack, device = collate or collator(model), next(model.parameters()).device
    order = sorted(range(len(data)), key=lambda i: len(data[i].get("input_ids", ())))
    shifted = predicts_next(model)
    summed, right, targets = 0.0, 0, 0
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = stack([data[i] for i in order[start : start + batch_size]])
            batch = {key: value.to(device) for key, value in batch.items()}
            count = count_targets(batch, shifted=shifted)
            targets += count
            if loss is not None:
                summed += loss(model, batch).item() * count
                continue
            output = model(**batch)
            summed += output.loss.item() * count
            right += _count_right(output.logits, batch["labels"], shifted)
    return {"loss": summed / targets} | ({} if loss else {"accuracy": right / targets})


def _count_right(logits: Tensor, labels: Tensor, shifted: bool) -> int:
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return int(((logits.argmax(-1) == labels) & (labels != IGNORED)).sum())
