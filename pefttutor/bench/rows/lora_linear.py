"""One LoRA linear layer, forward and backward, against HF PEFT's `lora.Linear`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from pefttutor.bench.row import Row, Side, Step
from pefttutor.kernels.lora_linear import lora_linear


def build(side: Side, seed: int, device: str, *, inputs: int, outputs: int, tokens: int, r: int) -> Step:
    """The same weights, input and incoming gradient for every side; x needs a gradient, as inside a model."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device)

    x = draw(tokens, inputs).requires_grad_()
    weight = nn.Parameter(draw(outputs, inputs, scale=inputs**-0.5), requires_grad=False)
    lora_A = nn.Parameter(draw(r, inputs, scale=inputs**-0.5))
    lora_B = nn.Parameter(draw(outputs, r, scale=r**-0.5))
    incoming = draw(tokens, outputs)
    scaling = 2.0  # lora_alpha = 2 r

    if side == "bound":
        return lambda: step_of(lambda: nn.functional.linear(x, weight), incoming, {"x": x})
    if side == "ours":
        ours = partial(lora_linear, x, weight, None, lora_A, lora_B, scaling)
        return lambda: step_of(ours, incoming, {"x": x, "lora_A": lora_A, "lora_B": lora_B})
    layer, trained = _peer(weight, lora_A, lora_B, scaling)
    return lambda: step_of(lambda: layer(x), incoming, {"x": x} | trained)


def _peer(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[nn.Module, dict[str, Tensor]]:
    import peft

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    linear.weight = nn.Parameter(weight.detach())
    r = lora_A.shape[0]
    config = peft.LoraConfig(r=r, lora_alpha=int(scaling * r), target_modules=["0"], lora_dropout=0.0)
    model = peft.get_peft_model(nn.Sequential(linear), config)  # type: ignore[arg-type]
    layer = model.base_model.model[0]
    trained = {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}
    with torch.no_grad():
        trained["lora_A"].copy_(lora_A)
        trained["lora_B"].copy_(lora_B)
    return layer, trained


def step_of(forward: Callable[[], Tensor], incoming: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Forward and backward. The result is let go before the backward pass, as inside a model; of it, a sample of
    the tokens (every 16th) is kept to be compared."""
    for leaf in leaves.values():
        leaf.grad = None
    y = forward()
    sample = y.detach()[::16].clone()
    end = torch.autograd.graph.get_gradient_edge(y)
    del y
    torch.autograd.backward([end], [incoming])
    return {"y": sample} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def build_fa(side: Side, seed: int, device: str) -> Step:
    """Ours with the first factor frozen, as LoRA-FA has it, beside ours with both trained."""
    generator = torch.Generator().manual_seed(seed)
    x, incoming = (torch.randn(2048, 768, generator=generator).to(device) for _ in range(2))
    weight, A, B = (
        nn.Parameter((torch.randn(shape, generator=generator) * shape[1] ** -0.5).to(device))
        for shape in ((768, 768), (8, 768), (768, 8))
    )
    weight.requires_grad_(False)
    A.requires_grad_(side == "peer")
    x.requires_grad_()
    return lambda: step_of(lambda: lora_linear(x, weight, None, A, B, 2.0), incoming, {"x": x, "lora_B": B})


def _row(inputs: int, outputs: int, tokens: int, r: int, **goals: float) -> Row:
    return Row(
        name=f"lora_linear_{inputs}x{outputs}_t{tokens}_r{r}",
        work=f"LoRA linear, forward + backward, {inputs} → {outputs}, T = {tokens}, r = {r}",
        peer="HF PEFT lora.Linear",
        build=partial(build, inputs=inputs, outputs=outputs, tokens=tokens, r=r),
        goals=goals,
        cuda_goals={"time": 0.85},
        bound="frozen linear, forward + input gradient",
        rounds=31,
    )


ROWS = [
    _row(768, 768, 2048, 8, time=0.74, transient=0.50),
    _row(2048, 2048, 1024, 16, time=0.92, transient=0.50),
    _row(768, 3072, 2048, 8, transient=0.50),
    Row(
        name="lora_fa",
        work="LoRA-FA linear, forward + backward, 768 → 768, T = 2048, r = 8",
        peer="our own LoRA",
        build=build_fa,
        goals={"kept": 0.02},
        cuda_goals={"kept": 0.02},
    ),
]
