"""What the rows of whole training steps have in common: their model, what trains in it, and the floor under them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["alike", "frozen_step", "llama_like"]


def llama_like(seed: int) -> Any:
    """35.7 M parameters: Llama's shape and its vocabulary of 32,000, six layers of 512."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=6,
        num_attention_heads=8,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).train()


def alike(model: nn.Module, names: Mapping[str, str], seed: int) -> dict[str, nn.Parameter]:
    """What trains, filled with numbers that are the same on both sides (B isn't zero), under names that both share.

    names: what is replaced in a parameter's name, and by what, in this order; ".weight" at its end goes, too.

    >>> layer = nn.ModuleDict({"default": nn.Linear(1, 1)})
    >>> alike(layer, {"default.": ""}, seed=0).keys() == alike(nn.Linear(1, 1), {}, seed=0).keys()
    True
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for old, new in names.items():
                name = name.replace(old, new)
            found[name.removesuffix(".weight")] = parameter
    generator = torch.Generator().manual_seed(seed + 1)
    for name in sorted(found):
        with torch.no_grad():
            found[name].copy_(torch.randn(found[name].shape, generator=generator) * 0.02)  # to its device
    return found


def frozen_step(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A frozen model's forward, and the gradient of its embedded input; nothing is given back."""
    embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
    rest = {key: value for key, value in batch.items() if key != "input_ids"}
    model(inputs_embeds=embedded, **rest).loss.backward()
    return {}
