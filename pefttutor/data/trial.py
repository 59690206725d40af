"""Try a model out and leave no trace: modes, random numbers, settings and gradients are afterwards as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "close_enough",
    "evaluating",
    "fresh_casts",
    "one_row",
    "ordinary",
    "settings",
    "special_tokens",
    "trial",
    "trying",
]

_TRYING: ContextVar[bool] = ContextVar("trying", default=False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block every module is in evaluation mode; after it each has its own mode back, even on an error.

    >>> dropout = nn.Dropout(0.5)
    >>> with evaluating(dropout):
    ...     dropout.training
    False
    >>> dropout.training
    True
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def fresh_casts() -> Iterator[None]:
    """Within the block `torch.autocast` keeps no cast of a weight, nor takes one of the weight as it was before.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> with torch.autocast("cpu"), fresh_casts():
    ...     _ = nn.init.ones_(layer.weight), layer(torch.ones(1)), nn.init.zeros_(layer.weight)
    ...     layer(torch.ones(1)).item()                                 # without fresh_casts 1.0, the old weight's
    0.0
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def trial(model: nn.Module) -> Iterator[None]:
    """Within the block `model` can be called without leaving a trace, neither in itself nor in random generators.

    >>> before = torch.get_rng_state()
    >>> with trial(nn.Dropout(0.5)):
    ...     _ = torch.rand(100)
    >>> torch.get_rng_state().equal(before)
    True
    """
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    configs = [(vars(config), dict(vars(config))) for config in _configs(model)]
    outside = _TRYING.set(True)
    try:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices), fresh_casts():
            yield
    finally:
        _TRYING.reset(outside)
        for config, before in configs:  # transformers notes there of which kind the first labels were
            config.update(before)


def trying() -> bool:
    """Whether a `trial` is going on: its text is nobody's, so that nothing need be refused about it.

    >>> with trial(nn.Linear(1, 1)):
    ...     trying()
    True
    >>> trying()
    False
    """
    return _TRYING.get()


def settings(model: nn.Module) -> list[Any]:
    """What the form of a model's loss may depend on: as long as it is equal, what a trial has shown holds.

    >>> layer = nn.Linear(1, 1)
    >>> before, _ = settings(layer), layer.register_forward_hook(print)
    >>> settings(layer) == before                                       # the hook may change what the loss sees
    False
    """
    own = [id(vars(model).get(name)) for name in ("forward", "_loss_function")]
    hooks = [*model._forward_pre_hooks, *model._forward_hooks]
    return [type(model), *own, hooks, *(dict(vars(config)) for config in _configs(model))]


def _configs(model: Any) -> list[Any]:
    """A model's config and those inside it, such as its decoder's."""
    config = getattr(model, "config", None)
    if not hasattr(config, "__dict__"):
        return []
    return [config, *(value for value in vars(config).values() if hasattr(value, "model_type"))]


def one_row(batch: dict[str, Any], *, length: int | None = None) -> dict[str, Any]:
    """The row of a batch with the fewest padding tokens, as a batch; with `length`, its first so many tokens.

    Whatever isn't one row for each of the labels stays whole.

    >>> mask = torch.tensor([[1, 0], [1, 1]])
    >>> one_row({"labels": torch.tensor([[5, 0], [6, 7]]), "attention_mask": mask})["labels"]
    tensor([[6, 7]])

    Shapes: (batch, …) → (1, …), and (batch, seq, …) → (1, length, …) where seq is that of the labels.
    """
    labels, mask = batch["labels"], batch.get("attention_mask")
    row = int(mask.flatten(1).sum(1).argmax()) if isinstance(mask, Tensor) and mask.ndim > 1 else 0
    found = {}
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.shape[:1] == labels.shape[:1]:
            long = value.shape[:2] == labels.shape[:2]
            value = value[row : row + 1, :length] if long else value[row : row + 1]
        found[key] = value
    return found


def ordinary(model: Any, classes: int, count: int) -> list[int]:
    """The first of so many classes, those that are special tokens of the model only if there are no others.

    >>> from types import SimpleNamespace
    >>> ordinary(SimpleNamespace(config=SimpleNamespace(pad_token_id=0, eos_token_id=2)), classes=10, count=3)
    [1, 3, 4]
    """
    special = special_tokens(model)
    return sorted(range(min(classes, 64 + count)), key=lambda i: i in special)[:count]


def special_tokens(model: Any) -> set[int]:
    """The ids that the model's config calls a token of a special kind.

    >>> from types import SimpleNamespace
    >>> special_tokens(SimpleNamespace(config=SimpleNamespace(pad_token_id=0, eos_token_id=[2, 3])))
    {0, 2, 3}
    """
    special: set[int] = set()
    for config in _configs(model):
        for name, value in vars(config).items():
            if name.endswith(("token_id", "token_index")):
                special.update(value if isinstance(value, (list, tuple)) else [value])
    return special


def close_enough(model: nn.Module) -> float:
    """How far two log-probabilities may differ that are computed in different batches, and are the same number.

    >>> close_enough(nn.Linear(1, 1)), close_enough(nn.Linear(1, 1).bfloat16())
    (0.0001, 0.05)
    """
    return 1e-4 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 5e-2
