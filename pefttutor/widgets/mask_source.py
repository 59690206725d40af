"""What `widgets.masks` accepts, made into one form: for each choice, a mask or a score for every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.widgets.names import place

__all__ = ["at_fraction", "choices", "kind_of", "layer_of", "overlap", "share"]

Tensors = Mapping[str, Tensor]


def choices(source: Any, name: str = "mask") -> dict[str, dict[str, Tensor]]:
    """By a choice's name, booleans (true: trained) or scores (larger: chosen first) for each tensor.

    source: an adapted model; masks or scores by the name of a tensor; or several of these by a name of one's own.
    Tensors that hold 0 and 1 alone are masks, whatever their type.

    >>> choices({"FISH": {"weight": torch.tensor([0.2, 0.7])}, "mine": {"weight": torch.tensor([0.0, 1.0])}})
    {'FISH': {'weight': tensor([0.2000, 0.7000])}, 'mine': {'weight': tensor([False,  True])}}

    Raises: ValueError for anything else, for choices that aren't over the same tensors, and for NaN.
    """
    if isinstance(source, nn.Module):
        from pefttutor.parts.entries import masks

        by_choice = {name: _of_the_base(masks(source))}
    elif isinstance(source, Mapping) and source and all(isinstance(v, Tensor) for v in source.values()):
        by_choice = {name: _as_booleans({key: value.detach().cpu() for key, value in source.items()})}
    elif isinstance(source, Mapping) and source:
        by_choice = {key: choices(value, key)[key] for key, value in source.items()}
    else:
        raise ValueError(
            f"expected a model, masks or scores by the name of a tensor, or several of them by name; got {type(source)}"
        )
    shapes = [{key: tuple(t.shape) for key, t in tensors.items()} for tensors in by_choice.values()]
    common = [key for key in shapes[0] if all(shape.get(key) == shapes[0][key] for shape in shapes)]
    if not common:
        raise ValueError(f"{' and '.join(by_choice)} have no tensor of one name and shape in common")
    for key, tensors in by_choice.items():
        for tensor_name in common:
            if tensors[tensor_name].isnan().any():
                raise ValueError(f"{key}: the scores of {tensor_name} hold NaN")
    return {key: {n: tensors[n] for n in common} for key, tensors in by_choice.items()}


def _of_the_base(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The masks without those of what a method puts beside a parameter to learn its mask, such as `weight_scores`."""
    return {
        name: mask
        for name, mask in tensors.items()
        if not any(name.startswith(f"{other}_") for other in tensors if other != name)
    }


def _as_booleans(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Masks that are written as numbers, such as `(scores > limit).float()`, as booleans; scores as they are."""
    if all(((t == 0) | (t == 1)).all() for t in tensors.values()):
        return {key: value.bool() for key, value in tensors.items()}
    return {
        key: value if value.is_floating_point() else value.to(torch.float64) for key, value in tensors.items()
    }


def at_fraction(tensors: Tensors, fraction: float) -> dict[str, Tensor]:
    """Masks stay as they are; of scores, the largest `fraction` over all tensors together is chosen.

    >>> at_fraction({"weight": torch.tensor([0.1, 0.9, 0.5, 0.3])}, 0.25)
    {'weight': tensor([False,  True, False, False])}
    """
    if all(t.dtype == torch.bool for t in tensors.values()):
        return dict(tensors)
    from pefttutor.parts.ranking import largest_share

    return largest_share(tensors, fraction)


def layer_of(names: Any) -> dict[str, str]:
    """The block of each tensor: "0", "1", … or "–" outside of the blocks.

    >>> layer_of(["embed.weight", "layers.3.q_proj.weight"])
    {'embed.weight': '–', 'layers.3.q_proj.weight': '3'}
    """
    return {name: row for name, (row, _) in place(names).items()}


def kind_of(name: str, tensor: Tensor) -> str:
    """bias, norm, embedding, attention, feed-forward or other, by the tensor's name and shape.

    >>> kind_of("layers.3.mlp.up_proj.weight", torch.zeros(2, 2)), kind_of("layers.3.norm.weight", torch.zeros(2))
    ('feed-forward', 'norm')
    """
    words = name.lower()
    if words.endswith("bias"):
        return "bias"
    if tensor.dim() == 1:
        return "norm"
    if any(word in words for word in ("embed", "wte", "wpe")):
        return "embedding"
    if any(word in words for word in ("mlp", "ffn", "intermediate", "up_proj", "down_proj", "fc", "dense_")):
        return "feed-forward"
    if any(word in words for word in ("attn", "attention", "q_proj", "query")):
        return "attention"
    return "other"


def share(masks: Tensors, group: Mapping[str, str]) -> dict[str, float]:
    """The share of chosen entries in each group of tensors, in order of first appearance.

    >>> masks = {"a": torch.tensor([True, False]), "b": torch.tensor([True, True])}
    >>> share(masks, {"a": "0", "b": "1"})
    {'0': 0.5, '1': 1.0}
    """
    sizes: dict[str, list[int]] = {}
    for name, mask in masks.items():
        counts = sizes.setdefault(group[name], [0, 0])
        counts[0] += int(mask.sum())
        counts[1] += mask.numel()
    return {key: chosen / total for key, (chosen, total) in sizes.items()}


def overlap(one: Tensors, other: Tensors) -> float:
    """Shared entries as a share of the smaller choice: 1 if one contains the other, 0 if nothing is shared.

    >>> overlap({"a": torch.tensor([True, True, False])}, {"a": torch.tensor([True, False, False])})
    1.0
    """
    both = sum(int((one[name] & other[name]).sum()) for name in one)
    least = min(sum(int(mask.sum()) for mask in masks.values()) for masks in (one, other))
    return both / least if least else 0.0
