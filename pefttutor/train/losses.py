"""Losses that `fit(loss=…)` takes in place of the model's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor.data.targets import IGNORED, aligned
from pefttutor.data.trial import one_row, settings, trial
from pefttutor.kernels.cross_entropy import linear_cross_entropy
from pefttutor.kernels.recompute import recompute_activations

__all__ = ["causal_lm_loss"]

ENOUGH = 4  # tokens: two predictions, a label that doesn't count, and a token that is masked
SPREAD = 30.0  # of the proof's logits: a cap or a factor shows, although the model's own may be small


def causal_lm_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss of `model(**batch).loss`, without the logits: `fit(model, train, loss=causal_lm_loss)`.

    loss = mean over t of −log softmax(hₜ Wᵀ + b)[label(t + 1)], labels of −100 left out

    The result and the gradients are the model's own; memory is lower, because the logits of a
    large vocabulary are most of a small model's activations (`linear_cross_entropy`), and because cheap
    activations are made again rather than kept (`recompute_activations`; not on a GPU, where it costs more time).

    The model itself is called. Only its head doesn't compute: what comes in and the weights that it sees then are
    taken from there, so that hooks and shadowed weights count. A head that is no plain linear layer (LoRA in it, a
    hook that looks at its output) is left alone, and the model's own loss is the result.

    Once for each model, head, config and kind of batch it is proved on four tokens that the model makes this loss of
    what its head says, and nothing else: the head is let say something with large differences, in evaluation mode.

    >>> from pefttutor.models import load
    >>> model, tokens = load("campus-nano")[0], torch.tensor([[5, 6, 7, 8, 9]])
    >>> batch = {"input_ids": tokens, "labels": tokens}
    >>> torch.allclose(causal_lm_loss(model, batch), model(**batch).loss)
    True

    Shapes: batch["input_ids"] and batch["labels"] (batch, seq), and whatever else the model takes → ().
    Cost: as `linear_cross_entropy`, for the labelled tokens.
    Raises: ValueError for a batch without labels; TypeError for a model without a head, or whose loss is another one.
    """
    if "labels" not in batch:
        raise ValueError(f"causal_lm_loss: the batch has {sorted(batch)}, expected 'labels' among them")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Module) or batch["labels"].ndim != 2:
        raise TypeError(
            f"causal_lm_loss: {type(model).__name__} has the head {type(head).__name__}, and labels of the shape "
            f"{tuple(batch['labels'].shape)}; expected a language model and a label for each token: leave `loss` out "
            "for it"
        )
    with nullcontext() if batch["labels"].is_cuda else recompute_activations():
        if not _is_plain(model, head) or batch["labels"].shape[1] < ENOUGH:
            return model(**batch).loss
        _prove(model, head, batch)
        hidden, weight, bias = _caught(model, head, batch)
    hidden, labels = aligned(hidden, batch["labels"], shifted=True)
    return linear_cross_entropy(hidden.flatten(0, 1), weight, labels.flatten(), bias)


def _is_plain(model: nn.Module, head: nn.Module) -> bool:
    """Whether a call of the head is that of nn.Linear, and nobody looks at what comes out of it, or of the model.

    A hook that is always called, also after an error, tidies up.
    """
    for module in (model, head):
        if set(module._forward_hooks) - set(module._forward_hooks_always_called):
            return False
        if module._backward_hooks or module._backward_pre_hooks:
            return False
    return type(head).forward is nn.Linear.forward and "forward" not in vars(head)


# ---- the head doesn't compute


@contextmanager
def _answering(head: nn.Module, answer: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block `answer` stands for the head's forward; hooks run around it as always."""
    vars(head)["forward"] = answer
    try:
        yield
    finally:
        del vars(head)["forward"]


def _caught(model: Any, head: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """What goes into the head, its weight and its bias, as they are while the model runs.

    Shapes: → (batch, seq, d), (vocabulary, d), (vocabulary) or None.
    """
    seen: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def look(x: Tensor) -> Tensor:
        seen.append((x, head.weight, head.bias))
        return x[..., :0]  # logits of no word at all

    with _answering(head, look):
        model(**{key: value for key, value in batch.items() if key != "labels"})
    _check_once(model, seen)
    return seen[0]


def _check_once(model: Any, calls: list[Any]) -> None:
    if len(calls) != 1:
        raise ValueError(f"{type(model).__name__} calls its head {len(calls)} times, expected once")


# ---- the proof

_proved: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def _prove(model: nn.Module, head: nn.Module, batch: dict[str, Any]) -> None:
    """Raise TypeError unless the model's own loss is shifted cross-entropy of what its head says."""
    now = (ref(head), tuple(head._forward_hooks), sorted(batch), settings(model))
    if _proved.get(model) == now:
        return
    own, ours, exact = _both_losses(model, head, batch)
    if not math.isclose(own, ours, rel_tol=exact, abs_tol=exact):
        raise TypeError(
            f"causal_lm_loss: of logits whose shifted cross-entropy is {ours:.6g}, {type(model).__name__} makes a loss "
            f"of {own:.6g}. So its loss is another one (labels that aren't shifted or are masked, logits that are "
            "scaled or capped, terms of a router): leave `loss` out for it"
        )
    _proved[model] = now


def _both_losses(model: Any, head: Any, batch: dict[str, Any]) -> tuple[float, float, float]:
    """The model's own loss for chosen logits, their shifted cross-entropy, and how exact the first one is."""
    reason: Exception | None = None
    for length in (ENOUGH, None):  # a model of more than texts may not take the first few tokens alone
        try:
            with trial(model):
                return _tried(model, head, _trial_batch(head, one_row(batch, length=length)))
        except Exception as error:  # whatever a model raises here
            reason = error
    raise TypeError(
        f"causal_lm_loss: {type(model).__name__} can't be run without its logits ({reason}): leave `loss` out for it"
    ) from reason


def _trial_batch(head: Any, row: dict[str, Any]) -> dict[str, Any]:
    """A row whose labels are all different, but for every fourth, which doesn't count; the last token is masked."""
    shape = row["labels"].shape
    labels = torch.arange(shape[1], device=row["labels"].device).remainder(head.out_features).view(shape)
    labels[:, 1::4] = IGNORED
    mask = row.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == shape:
        row = row | {"attention_mask": torch.cat([mask[:, :-1], torch.zeros_like(mask[:, -1:])], 1)}
    return row | {"labels": labels}


def _tried(model: Any, head: Any, row: dict[str, Any]) -> tuple[float, float, float]:
    said: list[tuple[Tensor, Tensor]] = []

    def say(x: Tensor) -> Tensor:
        logits = F.linear(x, head.weight, head.bias)  # for their shape and dtype
        spread = torch.arange(logits.numel(), device=logits.device).sin().mul(SPREAD)
        chosen = spread.to(logits.dtype).view_as(logits)
        said.append((x, chosen.clone()))  # the model may change its own in place
        return chosen

    with _answering(head, say):
        own = model(**row).loss
    _check_once(model, said)
    x, logits = said[0]
    if not torch.allclose(x, _caught(model, head, row)[0], equal_nan=True):
        raise ValueError("with labels, something else goes into its head")
    logits, labels = aligned(logits, row["labels"], shifted=True)
    ours = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
    return own.item(), ours.item(), max(1e-6, 4 * torch.finfo(own.dtype).eps)
