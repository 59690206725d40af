"""What a label predicts, which labels count, and which logits they belong to: once, for the whole package.

Causal language models compare what they say at position t with label t + 1, other models with label t, and names
don't tell: `BartForCausalLM` doesn't shift its labels, `Gemma3ForConditionalGeneration` does. So a model is asked:
it gets a label at the first position alone. Where labels shift, nothing predicts that one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from pefttutor.data.trial import one_row, ordinary, settings, trial

__all__ = ["IGNORED", "aligned", "count_targets", "predicts_next", "weighted"]

IGNORED = -100  # the label that every loss of transformers leaves out


def aligned(logits: Tensor, labels: Tensor, *, shifted: bool) -> tuple[Tensor, Tensor]:
    """The logits, and for each of them the label that it is compared with: −100 where there is none.

    Shifted, position t predicts label t + 1, the last one none. Logits (or hidden states) may have more positions
    than there are labels: virtual tokens stand in front. A class label is its text's own.

    >>> _, labels = aligned(torch.zeros(1, 3, 9), torch.tensor([[5, 6, 7]]), shifted=True)
    >>> labels                                                          # the last position predicts nothing
    tensor([[   6,    7, -100]])

    Shapes: (batch, n, …) and (batch, seq) → (batch, n, …) and (batch, n); (batch, classes) and (batch) stay.
    Raises: ValueError for labels that belong to no position.
    """
    if labels.ndim < 2:
        return logits, labels
    extra = logits.shape[1] - labels.shape[1]
    if extra and not shifted:
        raise ValueError(
            f"logits have {logits.shape[1]} positions, labels {labels.shape[1]}; expected as many: "
            "this model's loss compares them in another way"
        )
    return logits, pad(labels, (extra, 1), value=IGNORED)[:, 1:] if shifted else labels


def count_targets(batch: dict[str, Any], *, shifted: bool) -> int:
    """How many terms the mean of a loss has: examples for class labels, else labels that are not −100.

    >>> labels = torch.tensor([[5, 6, IGNORED]])
    >>> count_targets({"labels": labels}, shifted=False), count_targets({"labels": labels}, shifted=True)
    (2, 1)

    `shifted` says that the first position's label has no prediction (`predicts_next`).
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        return len(next(iter(batch.values())))
    if labels.is_floating_point():
        return len(labels)
    return int((labels[:, 1:] if shifted and labels.ndim > 1 else labels).ne(IGNORED).sum())


def weighted(batches: Sequence[dict[str, Any]], *, shifted: bool) -> list[tuple[dict[str, Any], float]]:
    """The parts of one step that have a target, each with its share of all targets: Σ share · loss is their mean.

    A part without a target must be left out: its mean is 0 / 0, and NaN · 0 would be NaN for all.

    >>> parts = [{"labels": torch.tensor([[1, 2, 3]])}, {"labels": torch.tensor([[4, IGNORED, IGNORED]])}]
    >>> [share for _, share in weighted(parts, shifted=False)]          # three labels and one
    [0.75, 0.25]

    Raises: ValueError if no part has a target.
    """
    counts = [count_targets(batch, shifted=shifted) for batch in batches]
    if not sum(counts):
        raise ValueError(
            f"there is nothing to learn from: all labels of this step are {IGNORED}"
            f"{' after the first position, which has no prediction' if shifted else ''}. Was the answer cut off "
            "by max_length?"
        )
    return [(batch, n / sum(counts)) for batch, n in zip(batches, counts, strict=True) if n]


# ---- asking a model


@dataclass
class _Known:
    """What is known of a model with these settings, and with what form of batch it was asked."""

    settings: list[Any]
    answer: bool | None = None
    asked: set[Any] = field(default_factory=set)


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def predicts_next(model: Any, batch: dict[str, Any] | None = None) -> bool:
    """Whether the model's own loss compares position t with label t + 1, as causal language models do.

    The model is run a few times on one row of `batch`, or else on three tokens, and what that shows is kept for as
    long as it has the same settings. Where it shows nothing, since the model can't be run so or all its logits are
    equal in every way, the name of its class decides.

    >>> from pefttutor.models import load
    >>> predicts_next(load("campus-nano")[0]), predicts_next(load("campus-encoder")[0])
    (True, False)
    """
    labels = batch.get("labels") if batch else None
    if isinstance(labels, Tensor) and (labels.ndim < 2 or labels.is_floating_point()):
        return False  # one for each text
    if isinstance(model, nn.Module):
        known = _known.get(model)
        if known is None or known.settings != settings(model):
            known = _known[model] = _Known(settings(model))
        form = frozenset((key, getattr(value, "ndim", None)) for key, value in (batch or {}).items())
        if known.answer is None and form not in known.asked:
            known.asked.add(form)
            known.answer = _shown(model, batch if isinstance(labels, Tensor) else None)
        if known.answer is not None:
            return known.answer
    return getattr(model, "loss_type", None) == "ForCausalLM" or type(model).__name__.endswith("LMHeadModel")


def _shown(model: nn.Module, batch: dict[str, Any] | None) -> bool | None:
    """What trials show on a row of the batch, on three tokens, on the whole batch; None where nothing can be seen."""
    ways: list[Callable[[], dict[str, Any]]] = [partial(_tokens, model)]
    if batch is not None:
        ways = [partial(one_row, batch), *ways, partial(dict, batch)]
    for inputs in ways:
        try:
            with trial(model):
                answer = _first_label_is_no_target(model, inputs())
        except Exception:  # whatever a model raises here means: it can't be asked in this way
            continue
        if answer is not None:
            return answer
    return None


def _tokens(model: Any) -> dict[str, Tensor]:
    """Three tokens of the model's vocabulary, and as many labels if its decoder reads these."""
    table = model.get_input_embeddings().weight
    tokens = torch.tensor([ordinary(model, len(table), 3)], device=table.device)
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return {"input_ids": tokens} | ({"labels": tokens} if both else {})


def _first_label_is_no_target(model: Any, inputs: dict[str, Any]) -> bool | None:
    """Whether labels are shifted; None if the loss doesn't depend on them at all."""
    device = next(model.parameters()).device
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    logits = model(**inputs).logits
    if logits.ndim != 3:
        return False  # one answer for each text
    empty = torch.full_like(inputs["labels"] if "labels" in inputs else inputs["input_ids"], IGNORED)

    def said(position: int) -> list[tuple[float, Tensor, Tensor]]:
        """The model's loss, its logits and the labels, for either of two labels at this position alone."""
        found = []
        for label in ordinary(model, logits.shape[-1], 2):
            labels = empty.clone()
            labels[:, position] = label
            output = model(**inputs | {"labels": labels})
            found.append((output.loss.item(), output.logits, labels))
        return found

    first = said(0)
    fits = [all(_is_mean(*one, shifted=shifted) for one in first) for shifted in (False, True)]
    if fits[0] != fits[1]:
        return fits[1]
    # There is something else in this loss; which label moves it can still be seen.
    if _differ(first):
        return False
    return True if _differ(said(1)) else None


def _differ(said: list[tuple[float, Tensor, Tensor]]) -> bool:
    (one, *_), (other, *_) = said
    return not _same(one, other)


def _is_mean(own: float, logits: Tensor, labels: Tensor, *, shifted: bool) -> bool:
    """Whether a loss is the mean cross-entropy of these logits: NaN, as 0 / 0 is, where no label counts."""
    if not shifted and logits.shape[1] != labels.shape[1]:
        return False
    logits, labels = aligned(logits, labels, shifted=shifted)
    exact = 1e-5 if logits.dtype in (torch.float32, torch.float64) else 1e-2
    return _same(own, cross_entropy(logits.flatten(0, 1).float(), labels.flatten()).item(), exact)


def _same(one: float, other: float, rel_tol: float = 1e-6) -> bool:
    return math.isclose(one, other, rel_tol=rel_tol) or (math.isnan(one) and math.isnan(other))
