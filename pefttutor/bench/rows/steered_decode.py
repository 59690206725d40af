"""Proxy-tuned writing, token by token: expert and anti-expert as two rows of one pass, and three models in a row.

s = s_M + α (s_M⁺ − s_M⁻), and M⁺ is M⁻ with a LoRA. The peer runs the three models one after the other, each with a
cache of its own, as the authors' code does, and the expert's LoRA is merged. In one pass M⁻'s weights are read once.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.bench.row import Row, Side, Step
from pefttutor.bench.steps import alike

ALPHA, R, PROMPT, TOKENS = 1.0, 8, 32, 8
TARGETS = ("q_proj", "v_proj")
STEERED, PAIR = "campus-small", "campus-nano"  # as in lesson 07


class TwoRows(nn.Module):
    """A linear layer that adds W_B W_A x in the first half of the batch. W_B holds LoRA's scaling, too."""

    lora_A: Tensor
    lora_B: Tensor

    def __init__(self, layer: nn.Linear, lora_A: Tensor, lora_B: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("lora_A", lora_A)
        self.register_buffer("lora_B", lora_B)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        half = len(x) // 2
        y[:half] += x[:half] @ self.lora_A.t() @ self.lora_B.t()
        return y


def build(side: Side, seed: int, device: str, *, batch: int) -> Step:
    """The steered logits of the next 8 tokens behind prompts of 32, which are in the caches. The bound is M alone."""
    from pefttutor.lowrank.lora import LoRA
    from pefttutor.method import detach
    from pefttutor.models import load

    base: Any = load(STEERED)[0].eval().to(device)
    minus: Any = load(PAIR)[0].eval()
    plus = LoRA(r=R, lora_alpha=2 * R, target_modules=TARGETS).attach(copy.deepcopy(minus))
    alike(plus, {}, seed)
    tokens = torch.randint(0, 50, (batch, PROMPT + TOKENS), generator=torch.Generator().manual_seed(seed)).to(
        device
    )
    models = [base]
    if side == "ours":
        models += [_both(minus, plus).to(device)]
    elif side == "peer":
        models += [detach(plus, keep=True).to(device), minus.to(device)]
    caches = [
        _read(model, _rows(model, side, i, tokens[:, :PROMPT]), None)[1] for i, model in enumerate(models)
    ]
    return lambda: _write(models, caches, tokens[:, PROMPT:], side)


def _both(minus: Any, plus: Any) -> Any:
    """M⁻, whose first half of the batch is M⁺."""
    both, learned = copy.deepcopy(minus), dict(plus.named_parameters())
    for name, layer in list(both.named_modules()):
        if name.endswith(TARGETS):
            A, B = (learned[f"{name}.lora_{factor}"].detach() for factor in "AB")
            parent, _, key = name.rpartition(".")
            setattr(both.get_submodule(parent), key, TwoRows(layer, A, 2.0 * B))
    return both


def _rows(model: Any, side: Side, i: int, tokens: Tensor) -> Tensor:
    """What the i-th model reads: the pair in one pass reads each text twice."""
    return torch.cat([tokens, tokens]) if side == "ours" and i else tokens


@torch.no_grad()
def _read(model: Any, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
    from pefttutor.parts.cached_attention import cache_key
    from pefttutor.parts.streams import cache_made

    given = {} if cache is None else {cache_key(model) or "": cache}
    output = model(tokens, use_cache=True, logits_to_keep=1, **given)
    return output.logits[:, -1], cache_made(output)


@torch.no_grad()
def _write(models: list[Any], caches: list[Any], tokens: Tensor, side: Side) -> dict[str, Tensor]:
    """Each model goes on from its cache, which in the end is as before. Which token comes next is given."""
    said = []
    for step in range(tokens.shape[1]):
        new = tokens[:, step : step + 1]
        rows = [_rows(model, side, i, new) for i, model in enumerate(models)]
        found = [_read(*each)[0] for each in zip(models, rows, caches, strict=True)]
        logits, *others = found if side != "ours" else (found[0], *found[1].chunk(2))
        said.append(logits + ALPHA * (others[0] - others[1]) if others else logits)
    for cache in caches:
        cache.crop(-TOKENS)
    return {"logits": torch.stack(said, 1)}


ROWS = [
    Row(
        name=f"steered_decode_{batch}",
        work=f"{TOKENS} steered tokens of {batch} text{'s' * (batch > 1)} behind {PROMPT}, {STEERED} by {PAIR}",
        peer="three models with caches, one after the other (the authors' way)",
        build=partial(build, batch=batch),
        goals={"time": goal},
        bound="the steered model alone",
        tolerance=1e-3,
    )
    for batch, goal in ((1, 0.60), (8, 0.65))
]
