"""Batches: `collate` examples into one, and say what a loss over it averages."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

IGNORED = -100  # the label that every loss of transformers leaves out
_PADDING = {"labels": IGNORED}  # every other key is padded with 0, input_ids with pad_token_id

Example = dict[str, Tensor]
Batch = dict[str, Tensor]
Loss = Callable[[Any, Batch], Tensor]
Collate = Callable[[list[Any]], Batch]


def collate(
    examples: Sequence[Example], pad_token_id: int | None = 0, side: str = "right"
) -> dict[str, Tensor]:
    """Pad 1-D tensors to one length and stack them; scalars are stacked as they are.

    input_ids are padded with `pad_token_id`, labels with −100, everything else (attention_mask) with 0.

    Shapes: n × (seq_i,) → (n, max seq); n × () → (n,).
    Raises: ValueError for an unknown side or examples with different keys.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side={side!r} is unknown; expected 'left' or 'right'")
    keys = list(examples[0])
    for example in examples:
        if set(example) != set(keys):
            raise ValueError(
                f"all examples need the same keys; one has {sorted(example)}, another {sorted(keys)}"
            )
    filling = _PADDING | {"input_ids": pad_token_id or 0}
    return {
        key: _stack([torch.as_tensor(e[key]) for e in examples], filling.get(key, 0), side) for key in keys
    }


def _stack(rows: list[Tensor], value: int, side: str) -> Tensor:
    if rows[0].ndim == 0:
        return torch.stack(rows)
    longest = max(row.shape[0] for row in rows)
    missing = [longest - row.shape[0] for row in rows]
    beside = [0, 0] * (
        rows[0].ndim - 1
    )  # pad() counts from the last dimension; the first one is the sequence
    sides = [[gap, 0] if side == "left" else [0, gap] for gap in missing]
    return torch.stack([pad(row, beside + s, value=value) for row, s in zip(rows, sides, strict=True)])


def predicts_next(model: Any) -> bool:
    """Whether the model's own loss compares position t with label t + 1, as causal language models do."""
    return getattr(model, "loss_type", None) == "ForCausalLM" or type(model).__name__.endswith("LMHeadModel")


def count_targets(batch: dict[str, Any], *, shifted: bool) -> int:
    """How many terms the mean of a loss has: examples for class labels, else labels that are not −100.

    `shifted` says that the first position's label has no prediction (`predicts_next`).
    """
    labels = batch.get("labels")
    if labels is None:
        return len(next(iter(batch.values())))
    if labels.ndim < 2 or labels.is_floating_point():
        return int((labels != IGNORED).sum()) if not labels.is_floating_point() else len(labels)
    return int((labels[:, 1:] if shifted else labels).ne(IGNORED).sum())


def collator(model: Any) -> Collate:
    """`collate` with the model's own padding token."""
    return partial(collate, pad_token_id=getattr(getattr(model, "config", None), "pad_token_id", None))
