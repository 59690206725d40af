"""A model's blocks: the list of its transformer layers, and what comes before it."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["below", "blocks"]


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of the model's blocks: the list with most parameters; of two alike, the last.

    >>> blocks(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])}))[0]
    'layers'

    Raises: ValueError if there is none.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    lists = [(name, m) for name, m in lists if len(m) > 1] or lists
    if not lists:
        raise ValueError("this model has no list of blocks (an nn.ModuleList).")
    return max(reversed(lists), key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


def below(model: nn.Module) -> set[Tensor]:
    """The parameters of what comes before the model's blocks: embeddings, their norm, positions, a patch projection.

    On the way from the model to the list of its blocks, that is each module's own parameters and those of the
    modules registered before the next step (an encoder-decoder's encoder, too), but not of one called final or out.
    """
    found: set[Tensor] = set()
    module = model
    for step in blocks(model)[0].split("."):
        children = list(module.named_children())
        before = children[: [name for name, _ in children].index(step)]
        found |= set(module.parameters(recurse=False))
        found |= {p for n, m in before if "final" not in n and "out" not in n for p in m.parameters()}
        module = module.get_submodule(step)
    return found
