"""A whole LoRA training step on a Llama-like model, against HF PEFT and the frozen floor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pefttutor.bench.row import Row, Side, Step

BATCH, SEQUENCE, R = 8, 128, 8
TARGETS = ("q_proj", "v_proj")


def build(side: Side, seed: int, device: str) -> Step:
    """Forward and backward of one batch: 8 texts of 128 tokens, every token labelled.

    The peer is what HF PEFT's users run: the same model (scaled-dot-product attention, float32, no dropout, no
    cache) under `get_peft_model`, its own loss. Ours is `LoRA.attach` and, opted in by one argument of `fit`,
    `causal_lm_loss`. The floor is the frozen model's forward and the gradient of its embedded input.
    """
    model = _model(seed).to(device)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.config.vocab_size, (BATCH, SEQUENCE), generator=generator).to(device)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    if side == "bound":
        return lambda: _frozen_step(model.requires_grad_(False), batch)
    if side == "ours":
        from pefttutor.lowrank.lora import LoRA
        from pefttutor.train.losses import causal_lm_loss

        LoRA(r=R, lora_alpha=2 * R, target_modules=TARGETS).attach(model)
        trained = _trained(model, seed)
        return lambda: _step(lambda: causal_lm_loss(model, batch), trained)
    import peft

    config = peft.LoraConfig(r=R, lora_alpha=2 * R, target_modules=list(TARGETS), lora_dropout=0.0)
    adapted = peft.get_peft_model(model, config)
    trained = _trained(adapted, seed)
    return lambda: _step(lambda: adapted(**batch).loss, trained)


def _model(seed: int) -> Any:
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


def _trained(model: torch.nn.Module, seed: int) -> dict[str, torch.nn.Parameter]:
    """The LoRA factors under names that both sides share, filled with the same numbers (B isn't zero)."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")
            found[name] = parameter
    generator = torch.Generator().manual_seed(seed + 1)
    for name in sorted(found):
        with torch.no_grad():
            found[name].copy_(torch.randn(found[name].shape, generator=generator) * 0.02)  # to its device
    return found


def _step(loss: Any, trained: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    for parameter in trained.values():
        parameter.grad = None
    value = loss()
    value.backward()
    return {"loss": value.detach()} | {name: p.grad for name, p in trained.items() if p.grad is not None}


def _frozen_step(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
    rest = {key: value for key, value in batch.items() if key != "input_ids"}
    model(inputs_embeds=embedded, **rest).loss.backward()
    return {}


ROWS = [
    Row(
        name="lora_step",
        work=f"whole LoRA step, Llama-like 36 M, {BATCH} × {SEQUENCE} tokens, r = {R}, forward + backward",
        peer="HF PEFT, get_peft_model",
        build=build,
        goals={"time": 0.72, "transient": 0.27, "resident": 0.20},
        cuda_goals={"time": 1.0, "transient": 0.60},
        bound="frozen model, forward + input gradient",
        tolerance=1e-3,
        rounds=9,
    )
]
