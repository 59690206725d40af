"""DoRA against HF PEFT: one linear layer, forward and backward, and the norm of its rows alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.bench.row import Row, Side, Step
from pefttutor.bench.rows.lora_linear import step_of

SCALING = 2.0  # lora_alpha = 2 r


def build(side: Side, seed: int, device: str, *, width: int, tokens: int, r: int) -> Step:
    """The same weights, input and incoming gradient for every side; x needs a gradient, as inside a model."""
    draw = _drawing(seed, device)
    x, incoming = draw(tokens, width).requires_grad_(), draw(tokens, width)
    layer = nn.Linear(width, width, bias=False, device=device).requires_grad_(False)
    layer.weight.data = draw(width, width, scale=width**-0.5)
    if side == "bound":
        return lambda: step_of(lambda: layer(x), incoming, {"x": x})
    factors = {"lora_A": draw(r, width, scale=width**-0.5), "lora_B": draw(width, r, scale=r**-0.5)}
    values = factors | {"magnitude": draw(width).abs()}
    model: Any = nn.Sequential(layer)
    if side == "ours":
        from pefttutor.lowrank.dora import DoRA

        DoRA(r=r, lora_alpha=SCALING * r, target_modules=("0",)).attach(model)
        trained = dict(zip(values, (p for p in model.parameters() if p.requires_grad), strict=True))
    else:
        model, trained = _peer(model, r)
    for name, value in values.items():
        trained[name].data.copy_(value)
    return lambda: step_of(lambda: model(x), incoming, {"x": x} | trained)


def build_norm(side: Side, seed: int, device: str, *, width: int, r: int) -> Step:
    """‖W + s B A‖ of each row, without a gradient; the peer makes B A, by the identity, as it does in each step."""
    draw = _drawing(seed, device)
    weight, A = draw(width, width, scale=width**-0.5), draw(r, width, scale=width**-0.5)
    B = draw(width, r, scale=r**-0.5)
    if side == "ours":
        from pefttutor.kernels.row_norms import row_norms

        return lambda: {"norm": row_norms(weight, A, B, SCALING)}
    layer = _peer(nn.Sequential(nn.Linear(width, width, bias=False, device=device)), r)[0][0]
    dora, factors = layer.lora_magnitude_vector["default"], (layer.lora_A["default"], layer.lora_B["default"])
    for factor, value in zip(factors, (A, B), strict=True):
        factor.weight.data.copy_(value)

    @torch.no_grad()
    def step() -> dict[str, Tensor]:
        change = dora.get_lora_weight(lora_A=factors[0], lora_B=factors[1], adapter_name="default")
        return {"norm": dora.get_weight_norm(weight, change, SCALING, adapter_name="default")}

    return step


def _drawing(seed: int, device: str) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device)

    return draw


def _peer(model: nn.Module, r: int) -> tuple[Any, dict[str, Any]]:
    import peft

    config = peft.LoraConfig(
        r=r, lora_alpha=int(SCALING * r), target_modules=["0"], lora_dropout=0.0, use_dora=True
    )
    layers: Any = peft.get_peft_model(model, config).base_model.model  # type: ignore[arg-type]
    layer = layers[0]
    return layers, {
        "lora_A": layer.lora_A["default"].weight,
        "lora_B": layer.lora_B["default"].weight,
        "magnitude": layer.lora_magnitude_vector["default"].weight,
    }


def _row(width: int, tokens: int, r: int, transient: float) -> Row:
    return Row(
        name=f"dora_linear_{width}_t{tokens}",
        work=f"DoRA linear, forward + backward, {width} → {width}, T = {tokens}, r = {r}",
        peer="HF PEFT lora.Linear with use_dora",
        build=partial(build, width=width, tokens=tokens, r=r),
        goals={"time": 0.58, "transient": transient},
        cuda_goals={"time": 0.85},
        bound="frozen linear, forward + input gradient",
        rounds=31,
    )


def _norm_row(width: int, r: int) -> Row:
    return Row(
        name=f"dora_norm_{width}",
        work=f"norm of the rows of W + s B A, {width} × {width}, r = {r}",
        peer="HF PEFT's DoraLinearLayer",
        build=partial(build_norm, width=width, r=r),
        goals={"time": 0.22, "transient": 0.01},
        cuda_goals={"time": 1.0},
        rounds=61,
    )


ROWS = [
    _row(768, 512, 8, 0.35),
    _row(768, 2048, 8, 0.35),
    _row(2048, 512, 16, 0.18),
    _row(2048, 2048, 16, 0.18),
    _norm_row(768, 8),
    _norm_row(2048, 16),
]
