"""LoHa, LoKr and VeRA as HF PEFT writes them: their factors have the same names and shapes there as here.

VeRA's A and B, which all layers share, lie in the file beside the model's tensors. Where its configuration says that
they don't, they are drawn as HF PEFT draws them, by torch's generator, whose numbers may change with its release.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.catalog import methods
from pefttutor.method import Attachment
from pefttutor.parts.linear import sizes, transposed
from pefttutor.parts.weight_delta import WeightDelta
from pefttutor.saving.peft_form import SHARED, Found, Written
from pefttutor.saving.peft_modules import module_at, names_for
from pefttutor.saving.peft_options import check_complete, check_options, check_patterns, keys_of

__all__ = ["read_products", "write_products"]

# What the method's fields and the configuration's options are called, and the tensors of a layer.
FIELDS = {
    "LoHa": ("r", "alpha"),
    "LoKr": ("r", "alpha", "decompose_both", "decompose_factor"),
    "VeRA": ("r", "d_initial", "vera_dropout", "projection_prng_key"),
}
LAYER = {"LoHa": r"hada_w[12]_[ab]", "LoKr": r"lokr_w[12](_[ab])?", "VeRA": r"vera_lambda_[bd]"}
READ = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "save_projection", "fan_in_fan_out",
    "init_weights", "use_effective_conv2d", "rank_dropout_scale",  # no effect on linear layers, without dropout
}  # fmt: skip


def write_products(model: nn.Module, attachment: Attachment) -> Written:
    """The factors or vectors of each layer, and VeRA's A and B, which would be others if they were drawn there."""
    method, kind = attachment.method, type(attachment.method).__name__
    parts = [part for part in attachment.parts if isinstance(part, WeightDelta)]
    options = {name: getattr(method, name) for name in FIELDS[kind]}
    options |= {"target_modules": names_for(model, [part.path for part in parts])}
    tensors = {
        f"{part.path}.{key.partition('@')[0]}": getattr(part.layer, key)
        for part in parts
        for key in part.added_keys
    }
    turned = [part.path for part in parts if transposed(part.layer)]
    if kind == "VeRA":
        options |= {"save_projection": True, "fan_in_fan_out": bool(turned)}
        tensors |= zip(SHARED, attachment.parts[0].added(), strict=True)
    elif turned:
        raise ValueError(
            f"HF PEFT's {kind} takes no Conv1D, and {turned[0]!r} is one: pefttutor.as_lora(model, r=…) makes a LoRA "
            "of the attachment."
        )
    return Written(kind.upper(), options, tensors)


def read_products(model: nn.Module, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Found:
    """LoHa, LoKr, or VeRA with the file's A and B or those that HF PEFT would draw."""
    kind = next(kind for kind in FIELDS if kind.upper() == config["peft_type"])
    check_options(config, {*FIELDS[kind], *READ}, bias="none", rank_dropout=0, module_dropout=0)
    check_patterns(config, config.get("r", 8), config.get("alpha", 8))
    keys = keys_of(tensors, rf"(?P<path>.+)\.{LAYER[kind]}")
    layers = {match["path"]: module_at(model, match["path"], key) for key, match in keys.items()}
    check_complete(model, config, layers)
    settings = {name: config[name] for name in FIELDS[kind] if name in config}
    settings["target_modules"] = names_for(model, list(layers))
    found, shared = {key: tensors[key] for key in keys}, {}
    if kind == "VeRA":
        settings["save_projection"] = True
        shared = {key: tensors[key] for key in SHARED if key in tensors}
        if not config.get("save_projection", True) and layers:
            shared = _drawn_there(list(layers.values()), settings)
    return Found(methods()[kind], settings, found | shared, {*keys, *shared})


def _drawn_there(layers: list[nn.Module], settings: dict[str, Any]) -> dict[str, Tensor]:
    """A and B of these layers as HF PEFT draws them: uniform in ±√(6 / columns). Shapes: → (r, in), (out, r)."""
    r = settings.get("r", 256)
    n_in, n_out = (max(side) for side in zip(*map(sizes, layers), strict=True))
    generator = torch.Generator().manual_seed(settings.get("projection_prng_key", 0))
    drawn = {}
    for key, shape in zip(SHARED, ((r, n_in), (n_out, r)), strict=True):
        bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(shape[1]))  # in this order, for the last bit
        drawn[key] = torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)
    return drawn
