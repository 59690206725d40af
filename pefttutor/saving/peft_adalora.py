"""AdaLoRA as HF PEFT writes it: only the triplets that count, and which ones those are.

    ΔW = lora_alpha / (init_r + 0.00001) · P Λ Q        as HF PEFT has it

Here s is lora_alpha / init_r, so a file's lora_alpha is another one: the model computes the same, and learns the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.catalog import methods
from pefttutor.method import Attachment
from pefttutor.parts.linear import transposed
from pefttutor.parts.triplets import KEPT, Triplets, draw_triplets
from pefttutor.saving.peft_form import Found, Written
from pefttutor.saving.peft_modules import module_at, names_for
from pefttutor.saving.peft_options import check_complete, check_options, keys_of

__all__ = ["read_adalora", "write_adalora"]

SCHEDULE = (
    "init_r",
    "target_r",
    "total_step",
    "tinit",
    "tfinal",
    "deltaT",
    "beta1",
    "beta2",
    "orth_reg_weight",
)
READ = {
    *SCHEDULE, "lora_alpha", "lora_dropout", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "fan_in_fan_out", "ensure_weight_tying",
    "r", "use_rslora", "init_lora_weights",  # these HF PEFT's AdaLoRA doesn't look at
}  # fmt: skip
COUNTER = "adalora_step"
LETTERS = "EAB"  # λ, Q and P


def _more(init_r: int) -> float:
    """By how much HF PEFT's divisor is larger than init_r: it adds 0.00001, in float32."""
    return float(torch.tensor(float(init_r)) + 1e-5) / init_r


def write_adalora(model: nn.Module, attachment: Attachment) -> Written:
    """λ, Q and P of what counts, or has an effect all the same, between two rounds in which ranks are given out."""
    method, parts = attachment.method, [part for part in attachment.parts if isinstance(part, Triplets)]
    words = [part.path for part in parts if part.words]
    if words:
        raise ValueError(
            f"HF PEFT's AdaLoRA takes no embeddings, and {words[0]!r} is one: pefttutor.as_lora(model, r=…) makes a "
            "LoRA of the attachment."
        )
    tensors, pattern = {}, {}
    for part in parts:
        lambdas, Q, P = part.triplets
        kept = part.held(KEPT) | (lambdas[:, 0] != 0)
        pattern[f"{part.path}.lora_E"] = kept.tolist()
        if method.scale_by_rank:
            lambdas = lambdas * (part.r / part.held(KEPT).sum().clamp_min(1))
        for letter, tensor in zip(LETTERS, (lambdas[kept], Q[kept], P[:, kept]), strict=True):
            tensors[f"{part.path}.lora_{letter}"] = tensor
    options = {name: getattr(method, name) for name in SCHEDULE} | {
        "lora_alpha": method.lora_alpha * _more(method.init_r),
        "lora_dropout": method.lora_dropout,
        "rank_pattern": pattern if not all(all(kept) for kept in pattern.values()) else None,
        "fan_in_fan_out": any(transposed(part.layer) for part in parts),
        "target_modules": names_for(model, [part.path for part in parts]),
    }
    return Written("ADALORA", options, tensors)


def read_adalora(model: nn.Module, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Found:
    """AdaLoRA, which goes on from the ranks that there are."""
    check_options(config, READ, bias="none")
    keys = keys_of(tensors, r"(?P<path>.+)\.lora_(?P<x>[ABE])")
    layers = {match["path"]: module_at(model, match["path"], key) for key, match in keys.items()}
    check_complete(model, config, layers)
    settings = {name: config[name] for name in SCHEDULE if name in config}
    settings |= {
        "target_modules": names_for(model, list(layers)),
        "lora_dropout": config.get("lora_dropout", 0.0),
    }
    kind, pattern = methods()["AdaLoRA"], config.get("rank_pattern") or {}
    method = kind(**settings)
    settings["lora_alpha"] = config.get("lora_alpha", 8) / _more(method.init_r)
    found: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(method.init_seed)
    for path, layer in layers.items():
        kept = torch.tensor(pattern.get(f"{path}.lora_E", [True] * method.init_r), dtype=torch.bool)
        given = {letter: tensors.get(f"{path}.lora_{letter}") for letter in LETTERS}
        found |= {
            f"{path}.{key}": t
            for key, t in _whole(path, layer, kept, given, generator, method.init_r).items()
        }
    left = sum(int(t.sum()) for key, t in found.items() if key.endswith(KEPT))
    steps = _steps(method, left, len(layers)) if pattern else 0
    return Found(kind, settings, found | {COUNTER: torch.tensor(steps)}, set(keys))


def _steps(method: Any, left: int, layers: int) -> int:
    """How many steps were taken, which no file says: as many as leave so many ranks. In the end all are given out, and
    not once more by importances that aren't known."""
    total = method.total_step or 0
    if not total or left <= method.budget(total - 1, layers):
        return total - method.tfinal + 1
    return next(step + 1 for step in range(total) if method.budget(step, layers) <= left)


def _whole(
    path: str,
    layer: nn.Module,
    kept: Tensor,
    given: Mapping[str, Tensor | None],
    generator: torch.Generator,
    r: int,
) -> dict[str, Tensor]:
    """All r triplets of a layer. What was cut has λ = 0 and is drawn anew, so that it may come back."""
    lambdas, Q, P = (given[letter] for letter in LETTERS)
    if lambdas is None or Q is None or P is None or {len(lambdas), len(Q), P.shape[-1]} != {int(kept.sum())}:
        raise ValueError(
            f"the file's triplets of {path!r} aren't the {int(kept.sum())} of its rank_pattern: "
            f"{', '.join(f'{letter} {tuple(t.shape)}' for letter, t in given.items() if t is not None)}."
        )
    fresh_Q, fresh_P = draw_triplets(layer, r, generator)
    whole = {"lora_E": torch.zeros(r, 1), "lora_A": fresh_Q, "lora_B": fresh_P}
    if kept.shape != (r,) or Q.shape[1:] != fresh_Q.shape[1:] or P.shape[:-1] != fresh_P.shape[:-1]:
        raise ValueError(
            f"the file's triplets of {path!r}, {tuple(Q.shape)} and {tuple(P.shape)}, don't fit the layer."
        )
    whole = {key: tensor.to(Q.dtype) for key, tensor in whole.items()}
    whole["lora_E"][kept], whole["lora_A"][kept], whole["lora_B"][:, kept] = lambdas, Q, P
    return whole | {KEPT: kept}
