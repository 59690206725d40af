"""Reading texts behind a soft prompt whose keys and values were computed once; HF PEFT reads it in every call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pefttutor.bench.row import Row, Side, Step
from pefttutor.bench.steps import llama_like

BATCH, SEQUENCE, VIRTUAL = 4, 32, 100


def build(side: Side, seed: int, device: str) -> Step:
    """One forward pass without gradients over 4 texts of 32 tokens behind 100 virtual ones; logits of the texts.

    Ours is a prefix that started as the prompt. The bound is the model on the texts alone.
    """
    model: Any = llama_like(seed).eval().to(device)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.config.vocab_size, (BATCH, SEQUENCE), generator=generator).to(device)
    prompt = torch.randn(VIRTUAL, model.config.hidden_size, generator=generator).to(device)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if side == "ours":
        from pefttutor.additive.inside.prefix import PrefixTuning

        PrefixTuning(num_virtual_tokens=VIRTUAL).attach(model, prompt)
    elif side == "peer":
        import peft

        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
        model = peft.get_peft_model(model, config).eval()
        model.prompt_encoder["default"].embedding.weight.data.copy_(prompt)
    return lambda: _read(model, batch)


@torch.no_grad()
def _read(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"logits": model(**batch).logits[:, -SEQUENCE:]}


ROWS = [
    Row(
        name="soft_prompt_prefill",
        work=f"reading {BATCH} × {SEQUENCE} tokens behind {VIRTUAL} virtual ones, Llama-like 36 M",
        peer="HF PEFT, PromptTuningConfig",
        build=build,
        goals={"time": 0.36},
        cuda_goals={"time": 1.0},
        bound="the texts alone",
        tolerance=1e-3,
    )
]
