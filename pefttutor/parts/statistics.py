"""A frozen batch normalisation keeps its running statistics: it computes with them, also while the model trains."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

__all__ = ["hold_statistics"]


def hold_statistics(model: nn.Module, learned: Collection[int] | None) -> None:
    """Let every normalisation with running statistics compute as in evaluation, except where they are learned.

    learned: the ids of buffers that an attachment trains and saves; None lets all go again. Otherwise the statistics
    of a frozen base would drift with the training data, unsaved, and the base wouldn't be the base any more.
    """
    for module in model.modules():
        buffers = [
            b
            for b in (getattr(module, "running_mean", None), getattr(module, "running_var", None))
            if b is not None
        ]
        if not buffers or "running_mean" not in module._buffers:
            continue
        held = learned is not None and not any(id(b) in learned for b in buffers)
        if held == (_hold in module._forward_pre_hooks.values()):
            continue
        if held:
            module.register_forward_pre_hook(_hold)
            module.register_forward_hook(_let_go, always_call=True)
            continue
        for hooks, ours in ((module._forward_pre_hooks, _hold), (module._forward_hooks, _let_go)):
            for handle in [handle for handle, hook in hooks.items() if hook is ours]:
                del hooks[handle]
                module._forward_hooks_always_called.pop(handle, None)


def _hold(module: nn.Module, args: Any) -> None:
    vars(module)["_mode_outside"], module.training = module.training, False


def _let_go(module: nn.Module, args: Any, output: Any) -> None:
    module.training = vars(module).pop("_mode_outside", module.training)
