"""Whole training steps on a Llama-like model, against HF PEFT (adapters: against hooks) and the frozen floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.bench.row import Row, Side, Step
from pefttutor.bench.steps import alike, frozen_step, llama_like

BATCH, SEQUENCE, R, VIRTUAL, MIDDLE, BOTTLENECK = 8, 128, 8, 20, 512, 32
TARGETS = ("q_proj", "v_proj")


def build(side: Side, seed: int, device: str, *, kind: str = "lora") -> Step:
    """Forward and backward of one batch: 8 texts of 128 tokens, every token labelled.

    The peer is what HF PEFT's users run: the same model (scaled-dot-product attention, float32, no dropout, no
    cache) under `get_peft_model`, its own loss, which holds AdaLoRA's penalty. Ours is the method attached and, opted
    in by one argument of `fit`, `causal_lm_loss`. HF PEFT has no bottleneck adapter: their peer is the formula in
    forward hooks. The floor is the frozen model's forward and the gradient of its embedded input.
    """
    model = llama_like(seed).to(device)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.config.vocab_size, (BATCH, SEQUENCE), generator=generator).to(device)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    if side == "bound":
        return partial(frozen_step, model.requires_grad_(False), batch)
    if side == "ours":
        from pefttutor.train.losses import causal_lm_loss

        method = KINDS[kind][0]()
        method.attach(model)
        trained = alike(model, NAMES, seed)
        penalty = getattr(method, "penalty", None)
        extra = (lambda: penalty(model)) if penalty else (lambda: 0)
        return lambda: _step(lambda: causal_lm_loss(model, batch) + extra(), trained)
    adapted = KINDS[kind][1](model)
    trained = alike(adapted, NAMES, seed)
    return lambda: _step(lambda: adapted(**batch).loss, trained)


def _ours(name: str, **settings: Any) -> Any:
    import pefttutor

    return getattr(pefttutor, name)(**settings)


def _peft(config: str, model: Any, **settings: Any) -> Any:
    import peft

    return peft.get_peft_model(model, getattr(peft, config)(**settings))


def _hooked(model: nn.Module) -> nn.Module:
    """Pfeiffer's adapters by stock torch: behind the last layer of each block h + W_u gelu(W_d h + b_d) + b_u."""
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if name.endswith("mlp.down_proj"):
            width = layer.out_features
            layer.adapter = nn.Sequential(
                nn.Linear(width, BOTTLENECK), nn.GELU(), nn.Linear(BOTTLENECK, width)
            ).to(layer.weight.device)
            layer.register_forward_hook(lambda layer, _, h: h + layer.adapter(h))
    return model


_LORA = {"r": R, "lora_alpha": 2 * R, "lora_dropout": 0.0}
_ADALORA = {"init_r": 12, "target_r": R, "lora_alpha": 24, "lora_dropout": 0.0, "total_step": 1000}
_PREFIX = {"num_virtual_tokens": VIRTUAL}
_MLP = _PREFIX | {"prefix_projection": True, "encoder_hidden_size": MIDDLE}
_TARGETS = {"target_modules": TARGETS}
_LISTED = {"target_modules": list(TARGETS)}
_CAUSAL = {"task_type": "CAUSAL_LM"}

KINDS: Mapping[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "lora": (
        partial(_ours, "LoRA", **_LORA, **_TARGETS),
        partial(_peft, "LoraConfig", **_LORA, **_LISTED),
    ),
    "dora": (
        partial(_ours, "DoRA", **_LORA, **_TARGETS),
        partial(_peft, "LoraConfig", use_dora=True, **_LORA, **_LISTED),
    ),
    "adalora": (
        partial(_ours, "AdaLoRA", **_ADALORA, **_TARGETS),
        partial(_peft, "AdaLoraConfig", **_ADALORA, **_LISTED, **_CAUSAL),
    ),
    "prefix": (
        partial(_ours, "PrefixTuning", **_PREFIX),
        partial(_peft, "PrefixTuningConfig", **_PREFIX, **_CAUSAL),
    ),
    "prefix_mlp": (
        partial(_ours, "PrefixTuning", **_MLP),
        partial(_peft, "PrefixTuningConfig", **_MLP, **_CAUSAL),
    ),
    "adapter": (partial(_ours, "Adapter", bottleneck=BOTTLENECK, placement="pfeiffer"), _hooked),
}


# What the peers call a parameter, and we: the first that is found is replaced by the second.
NAMES = {
    "base_model.model.": "",
    "prompt_encoder.default.embedding": "model.prefix",
    "model.prefix_table": "model.prefix",
    "prompt_encoder.default.transform.0.": "model.prefix_0_",
    "prompt_encoder.default.transform.2.": "model.prefix_2_",
    ".adapter.0.weight": ".adapter_down",
    ".adapter.0.bias": ".adapter_down_bias",
    ".adapter.2.weight": ".adapter_up",
    ".adapter.2.bias": ".adapter_up_bias",
    ".default": "",
}


def _step(loss: Any, trained: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    for parameter in trained.values():
        parameter.grad = None
    value = loss()
    value.backward()
    return {"loss": value.detach()} | {name: p.grad for name, p in trained.items() if p.grad is not None}


def _row(kind: str, what: str, peer: str = "HF PEFT, get_peft_model", **goals: Any) -> Row:
    return Row(
        name=f"{kind}_step",
        work=f"whole step of {what}, Llama-like 36 M, {BATCH} × {SEQUENCE} tokens, forward + backward",
        peer=peer,
        build=partial(build, kind=kind),
        bound="frozen model, forward + input gradient",
        tolerance=1e-3,
        rounds=9,
        **goals,
    )


_CUDA = {"time": 1.0}
ROWS = [
    _row(
        "lora",
        f"LoRA, r = {R}",
        goals={"time": 0.72, "transient": 0.27, "resident": 0.20},
        cuda_goals=_CUDA | {"transient": 0.60},
    ),
    _row("dora", f"DoRA, r = {R}", goals={"time": 0.62}, cuda_goals=_CUDA),
    _row("adalora", "AdaLoRA with its penalty, 12 triplets", goals={"time": 0.66}, cuda_goals=_CUDA),
    _row("prefix", f"prefix tuning, {VIRTUAL} virtual tokens", goals={"time": 0.87}, cuda_goals=_CUDA),
    _row("prefix_mlp", f"the same, with the MLP of {MIDDLE}", goals={"time": 0.87}, cuda_goals=_CUDA),
    _row(
        "adapter",
        f"Pfeiffer's adapters, bottleneck {BOTTLENECK}",
        peer="the formula in forward hooks",
        goals={"time": 0.87},
        cuda_goals=_CUDA,
    ),
]
