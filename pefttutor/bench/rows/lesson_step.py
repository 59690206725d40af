"""The step of the lessons: LoRA on the embedded models, forward, backward and AdamW, against HF PEFT's model."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pefttutor.bench.row import Row, Side, Step
from pefttutor.bench.steps import alike, frozen_step

BATCH, SEQUENCE, R = 16, 25, 8
# What HF PEFT adds to the name of a parameter that we have, too.
_NAMES = dict.fromkeys(("base_model.model.", "modules_to_save.", ".default", "default."), "")


def build(side: Side, seed: int, device: str, *, model_name: str) -> Step:
    """Sixteen reviews of some 25 tokens to classify: two projections a layer and the new head train.

    Both sides are stepped by the same torch AdamW; the peer is the model that `peft.get_peft_model` gives. The bound
    is the frozen model's forward and the gradient of its embedded input.
    """
    from pefttutor.lowrank.lora import LoRA
    from pefttutor.models import load

    model = load(model_name, head="classification", num_labels=2)[0].train().to(device)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, model.config.vocab_size, (BATCH, SEQUENCE), generator=generator).to(device)
    labels = torch.randint(0, 2, (BATCH,), generator=generator).to(device)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    if side == "bound":
        return partial(frozen_step, model.requires_grad_(False), batch)
    if side == "ours":
        LoRA(r=R, lora_alpha=2 * R, modules_to_save=("score",)).attach(model)
        return _Step(model, batch, seed)
    import peft

    targets = ["q_proj", "v_proj"]
    settings: dict[str, Any] = {"target_modules": targets, "lora_dropout": 0.0, "modules_to_save": ["score"]}
    return _Step(peft.get_peft_model(model, peft.LoraConfig(r=R, lora_alpha=2 * R, **settings)), batch, seed)


class _Step:
    """Forward, backward and one step of AdamW."""

    def __init__(self, model: Any, batch: dict[str, Tensor], seed: int) -> None:
        self.model, self.batch = model, batch
        self.trained = alike(model, _NAMES, seed)
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-4)

    def __call__(self) -> dict[str, Tensor]:
        self.optimizer.zero_grad()
        loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()} | {
            name: p.grad for name, p in self.trained.items() if p.grad is not None
        }


def _row(model_name: str, threads: int) -> Row:
    return Row(
        name=f"lesson_step_{model_name.removeprefix('campus-')}_{threads}",
        work=f"the lessons' LoRA step, {model_name}, {BATCH} × {SEQUENCE} tokens, r = {R}, with AdamW",
        peer="HF PEFT, get_peft_model",
        build=partial(build, model_name=model_name),
        goals={"time": 0.95},
        cuda_goals={"time": 0.95},
        threads=threads,
        bound="frozen model, forward + input gradient",
        tolerance=1e-3,
        rounds=61,
    )


ROWS = [_row(model_name, threads) for model_name in ("campus-nano", "campus-small") for threads in (1, 2)]
