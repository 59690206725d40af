"""LoRA and its relatives as HF PEFT writes them: LoRA-FA and LoRA+ as LoRAs, PiSSA and MiLoRA as one of twice the
rank.

PiSSA: ΔW = s · (B A − B₀ A₀) = s · [B, −B₀] [A; A₀]          a LoRA on the base as it was published
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.catalog import methods
from pefttutor.method import Attachment
from pefttutor.parts.linear import transposed
from pefttutor.parts.lowrank_layer import LowRank
from pefttutor.saving.peft_form import Found, Written
from pefttutor.saving.peft_modules import module_at, names_for
from pefttutor.saving.peft_options import check_complete, check_options, check_patterns, keys_of

__all__ = ["read_lora", "write_lora"]

MAGNITUDE = "lora_magnitude_vector"
STARTS = ("lora_A_start", "lora_B_start")  # what PiSSA and MiLoRA subtract
READ = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "eva_config",
    "ensure_weight_tying", "rank_pattern", "alpha_pattern",
}  # fmt: skip
ONLY_A_START = (True, False, None, "gaussian", "orthogonal", "eva")  # which leave the base as it is


def write_lora(model: nn.Module, attachment: Attachment) -> Written:
    """The two factors of each layer; what only training knows of (a seed, a rate of B, a frozen A) is left behind."""
    method, parts = attachment.method, [part for part in attachment.parts if isinstance(part, LowRank)]
    tensors: dict[str, Tensor] = {}
    twice = 1
    for part in parts:
        A, B = part.factors
        if "lora_A_start" in {key.partition("@")[0] for key in part.added_keys}:
            A0, B0 = (part.held(key) for key in STARTS)
            A, B, twice = torch.cat([A, A0]), torch.cat([B, -B0], 1), 2
        form = "{}.lora_embedding_{}" if part.words else "{}.lora_{}.weight"
        tensors |= {form.format(part.path, letter): factor for letter, factor in (("A", A), ("B", B))}
        if any(key.startswith(MAGNITUDE) for key in part.added_keys):
            tensors[f"{part.path}.{MAGNITUDE}"] = part.held(MAGNITUDE)
    options = {
        "r": twice * method.r,
        "lora_alpha": twice * method.lora_alpha,
        "lora_dropout": method.lora_dropout,
        "use_rslora": getattr(method, "use_rslora", False),
        "use_dora": any(key.endswith(MAGNITUDE) for key in tensors),
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": any(transposed(part.layer) and not part.words for part in parts),
        "target_modules": names_for(model, [part.path for part in parts]),
    }
    return Written("LORA", options, tensors)


def read_lora(model: nn.Module, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Found:
    """LoRA, DoRA for `use_dora`, or PiSSA where the file's factors stand in a residual's place."""
    check_options(config, READ, bias="none")
    r, alpha, start = config.get("r", 8), config.get("lora_alpha", 8), config.get("init_lora_weights", True)
    check_patterns(config, r, alpha)
    dora, pissa = bool(config.get("use_dora")), start == "pissa"
    if (start not in ONLY_A_START and not pissa) or (dora and pissa):
        raise ValueError(
            f"adapter_config.json has init_lora_weights = {start!r}, which has changed the base's own weights, so the "
            "factors alone say nothing: save it from HF PEFT as a plain LoRA, with "
            "save_pretrained(…, path_initial_model_for_weight_conversion=…)."
        )
    keys, found = _factors(model, tensors, words=not pissa)
    paths = list(dict.fromkeys(match["path"] for match in keys.values()))
    check_complete(model, config, paths)
    if any(path.endswith(("lm_head", "embed_tokens")) for path in paths):
        check_options(
            {"ensure_weight_tying": config.get("ensure_weight_tying")}, ()
        )  # then one's factors are the other's
    settings = {
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": config.get("lora_dropout", 0.0),
        "target_modules": names_for(model, paths),
    }
    if not pissa:
        settings["use_rslora"] = config.get("use_rslora") or False
    elif config.get("use_rslora"):
        settings["lora_alpha"] = alpha * math.sqrt(r)  # PiSSA's s is lora_alpha / r
    kind = methods()["DoRA" if dora else "PiSSA" if pissa else "LoRA"]
    return Found(kind, settings, found, set(keys), computed=STARTS if pissa else ())


def _factors(
    model: nn.Module, tensors: Mapping[str, Tensor], *, words: bool
) -> tuple[dict[str, re.Match[str]], dict[str, Tensor]]:
    """The file's keys of factors and magnitudes, and these by our names. words: whether they may be an embedding's."""
    found: dict[str, Tensor] = {}
    keys = keys_of(
        tensors, rf"(?P<path>.+)\.(?:lora_(embedding_)?(?P<x>[AB])(\.weight)?|{MAGNITUDE}(\.weight)?)"
    )
    for key, match in keys.items():
        layer = module_at(model, match["path"], key)
        if not words and isinstance(layer, nn.Embedding):
            raise ValueError(
                f"HF PEFT starts no embedding as PiSSA does, and {match['path']!r} of the file is one, so its layers "
                "have two kinds of starts: save it there as a plain LoRA, with "
                "save_pretrained(…, path_initial_model_for_weight_conversion=…)."
            )
        name = f"{match['path']}.{'lora_' + match['x'] if match['x'] else MAGNITUDE}"
        if name in found:
            raise ValueError(
                f"the file has {key!r} and the same once more, under another key: is it damaged?"
            )
        found[name] = tensors[key]
    return keys, found
