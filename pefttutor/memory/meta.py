"""A model without values: every shape, name and flag of it, and no memory (PyTorch's meta device)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pefttutor.memory.heads import knows
from pefttutor.method import attached

__all__ = ["on_meta", "skeleton", "with_method"]


def skeleton(config: Any, *, dtype: torch.dtype, like: Any = None) -> nn.Module:
    """The model that `config` describes, without values.

    Its class is `like`, else the one that the config names if the estimator knows that one's head, else the usual one
    for training.

    >>> from transformers import BertConfig
    >>> skeleton(BertConfig(), dtype=torch.bfloat16).bert.pooler.dense.weight.device
    device(type='meta')

    Raises: ValueError, from transformers, for a config that contradicts itself.
    """
    import transformers

    named = like or getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    autos = [transformers.AutoModelForSeq2SeqLM] if config.model_type in ("t5", "mt5") else []
    autos += [transformers.AutoModelForCausalLM, transformers.AutoModelForImageClassification]
    if config.model_type == "bert":  # transformers has a causal BERT too, which nobody means
        autos = [transformers.AutoModelForSequenceClassification]
    with torch.device("meta"):
        if named is not None:
            model = named._from_config(copy.deepcopy(config), dtype=dtype)
            if like or knows(model):
                return model
        auto = next(auto for auto in autos if type(config) in auto._model_mapping)
        return auto.from_config(config, dtype=dtype)


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of `model` whose parameters and buffers have no values; ties stay ties, and nothing is allocated.

    >>> on_meta(nn.Linear(3, 2)).weight.device
    device(type='meta')
    """
    empty: dict[int, Any] = {}
    aside = [t for a in attached(model).values() for part in a.parts for t in part.kept_aside()]
    for tensor in [*model.parameters(), *model.buffers(), *aside]:
        new = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        empty[id(tensor)] = new
    return copy.deepcopy(model, empty)


class _WithoutValues(TorchFunctionMode):
    """Inside, whatever is made is made on the meta device; random numbers need no generator there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        kwargs.pop("generator", None)
        return func(*args, **kwargs)


def with_method(method: Any, model: nn.Module) -> nn.Module:
    """`method.attach(model)` for a model on the meta device: names, shapes and flags, and no random numbers drawn.

    >>> from pefttutor.lowrank import LoRA
    >>> with_method(LoRA(r=2, target_modules=("0",)), on_meta(nn.Sequential(nn.Linear(6, 4))))[0].lora_A.shape
    torch.Size([2, 6])

    Raises: ValueError for a method that chooses by the values of the weights or of data.
    """
    try:
        with torch.device("meta"), _WithoutValues():
            return method.attach(model)
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{type(method).__name__} needs the model's values to attach ({error}). Attach it to a real model, and "
            "estimate that: estimate(method.attach(model))"
        ) from error
