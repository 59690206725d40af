"""What an example may be: refused before the first step, with what was given and what was expected."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pefttutor.data.batches import IGNORED, predicts_next


def check_examples(model: nn.Module, examples: Sequence[Any], name: str, *, needs_labels: bool) -> None:
    """Raise ValueError for an empty data set and for labels that the model can't be trained on.

    Cost: one pass over the labels, no forward.
    """
    if len(examples) == 0:
        raise ValueError(f"{name} is empty; expected at least one example")
    first = examples[0]
    if not isinstance(first, dict) or not all(isinstance(v, Tensor) for v in first.values()):
        kind = sorted(first) if isinstance(first, dict) else type(first).__name__
        raise ValueError(
            f"{name}[0] is {kind}; expected a dict of tensors. "
            "Make them with pefttutor.data.encode(split, tokenizer)."
        )
    if not needs_labels:
        return
    classes, words = _limits(model)
    shifted = predicts_next(model)
    for i in range(len(examples)):
        example = examples[i]
        if "labels" not in example:
            raise ValueError(f"{name}[{i}] has no labels, only {', '.join(example)}; or give loss=")
        labels, ids = example["labels"], example.get("input_ids")
        where = f"{name}[{i}]"
        if ids is not None:
            _check_range(ids, 0, words, f"{where}: input_ids", "tokens in the model's vocabulary")
        if labels.is_floating_point():
            continue
        if labels.ndim == 0:
            _check_range(labels, 0, classes, f"{where}: the label", "classes of the model")
            continue
        if ids is not None and labels.shape != ids.shape:
            raise ValueError(
                f"{where}: labels have the length {len(labels)}, input_ids {len(ids)}; "
                f"expected one label a token ({IGNORED} where none counts) or a single class"
            )
        counted = labels[labels != IGNORED]
        highest = classes if type(model).__name__.endswith("ForTokenClassification") else words
        _check_range(counted, 0, highest, f"{where}: a label", "outputs of the model")
        if not (labels[1:] if shifted else labels).ne(IGNORED).any():
            raise ValueError(
                f"{where} has no label to learn from: all are {IGNORED}"
                f"{' after the first position, which has no prediction' if shifted else ''}"
            )


def _limits(model: Any) -> tuple[int | None, int | None]:
    """How many classes and how many words the model knows; None where it doesn't say."""
    config = getattr(model, "config", None)
    classifies = type(model).__name__.endswith("Classification")
    return getattr(config, "num_labels", None) if classifies else None, getattr(config, "vocab_size", None)


def _check_range(values: Tensor, low: int, high: int | None, what: str, of_what: str) -> None:
    if high is None or values.numel() == 0:
        return
    smallest, largest = int(values.min()), int(values.max())
    if smallest < low or largest >= high:
        wrong = smallest if smallest < low else largest
        raise ValueError(f"{what} is {wrong}, expected {low} to {high - 1} (there are {high} {of_what})")
