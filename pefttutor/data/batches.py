"""Batches: `collate` examples into one."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pefttutor.data.targets import IGNORED, aligned, count_targets, predicts_next, weighted

__all__ = [
    "IGNORED", "Batch", "Collate", "Example", "Loss", "aligned", "collate", "collator", "count_targets",
    "predicts_next", "weighted",
]  # fmt: skip

Example = dict[str, Tensor]
Batch = dict[str, Tensor]
Loss = Callable[[Any, Batch], Tensor]
Collate = Callable[[list[Any]], Batch]


def collate(
    examples: Sequence[Example], pad_token_id: int | None = 0, side: str = "right"
) -> dict[str, Tensor]:
    """Pad 1-D tensors to one length and stack them; scalars are stacked as they are.

    Token numbers (…input_ids) are padded with `pad_token_id`, or 0 where that is no token; labels with −100;
    everything else (attention_mask) with 0. Of tensors with more dimensions the first one is padded.

    >>> long, short = ({key: torch.tensor(ids) for key in ("input_ids", "labels")} for ids in ([5, 6], [7]))
    >>> {key: rows.tolist() for key, rows in collate([long, short]).items()}         # padding has no label
    {'input_ids': [[5, 6], [7, 0]], 'labels': [[5, 6], [7, -100]]}

    Shapes: n × (seq_i,) → (n, max seq); n × () → (n,); n × (rows_i, …) → (n, max rows, …).
    Raises: ValueError for an unknown side, no examples, ones with different keys, or shapes that can't be stacked.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side={side!r} is unknown; expected 'left' or 'right'")
    if len(examples) == 0:
        raise ValueError("there are no examples to collate; expected at least one")
    keys = list(examples[0])
    for example in examples:
        if set(example) != set(keys):
            raise ValueError(
                f"all examples need the same keys; one has {sorted(example)}, another {sorted(keys)}"
            )
    token = pad_token_id if pad_token_id is not None and pad_token_id >= 0 else 0
    return {
        key: _stack(key, [torch.as_tensor(e[key]) for e in examples], _filling(key, token), side)
        for key in keys
    }


def _filling(key: str, token: int) -> int:
    if key.endswith("input_ids"):  # also decoder_input_ids
        return token
    return IGNORED if key == "labels" else 0


def _stack(key: str, rows: list[Tensor], value: int, side: str) -> Tensor:
    shapes = list(dict.fromkeys(tuple(row.shape) for row in rows))
    batched = key.endswith("input_ids") and any(len(shape) == 2 and shape[0] == 1 for shape in shapes)
    if batched or len({(len(shape), shape[1:]) for shape in shapes}) > 1:
        raise ValueError(
            f"{key!r} of the examples has the shapes {', '.join(map(str, shapes[:3]))}; expected one sequence an "
            "example, such as (seq,), where only the first dimension may differ. Is there a batch dimension in "
            "front (return_tensors='pt')? Take it off: x[0]"
        )
    if rows[0].ndim == 0:
        return torch.stack(rows)
    longest = max(row.shape[0] for row in rows)
    # pad() counts from the last dimension; the first one, the sequence, comes at the end.
    beside = [0, 0] * (rows[0].ndim - 1)
    missing = [longest - row.shape[0] for row in rows]
    sides = [[gap, 0] if side == "left" else [0, gap] for gap in missing]
    return torch.stack([pad(row, beside + s, value=value) for row, s in zip(rows, sides, strict=True)])


def collator(model: Any, *, side: str = "right") -> Collate:
    """`collate` with the model's own padding token, and the given padding side: `fit(…, collate=collator(model))`.

    >>> from types import SimpleNamespace
    >>> left = collator(SimpleNamespace(config=SimpleNamespace(pad_token_id=9)), side="left")
    >>> left([{"input_ids": torch.tensor([5, 6])}, {"input_ids": torch.tensor([7])}])["input_ids"].tolist()
    [[5, 6], [9, 7]]
    """
    config = getattr(model, "config", None)
    return partial(collate, pad_token_id=getattr(config, "pad_token_id", None), side=side)
