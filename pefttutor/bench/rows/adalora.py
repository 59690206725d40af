"""AdaLoRA's own work in a step, apart from the model's: its penalty, its importances, its budget; against HF PEFT."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from pefttutor.bench.row import Row, Side, Step
from pefttutor.bench.rows.whole_step import NAMES
from pefttutor.bench.steps import alike, llama_like

R, EVERY = 12, 10  # triplets a layer; of so many layers one is compared
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LONG = 1_000_000  # steps: the budget shrinks by less than a triplet in a measurement, and is given out in each step

Work = Literal["penalty", "importance", "budget"]


def build(side: Side, seed: int, device: str, *, work: Work) -> Step:
    """Triplets in all 42 linear layers of the Llama-like model: 126 tensors, with gradients that both sides share.

    The penalty is taken forward and backward; the peer is the code that HF PEFT runs around the model's forward, with
    a model that says nothing. Importance and budget are what follows the optimizer's step: of a step before the budget
    moves, and of one in which it is given out too.
    """
    model = llama_like(seed).to(device)
    tinit = LONG // 2 if work == "importance" else 0
    settings: dict[str, Any] = {"init_r": R, "target_r": 8, "total_step": LONG, "tinit": tinit}
    if side == "ours":
        from pefttutor import AdaLoRA, attached
        from pefttutor.train.hooks import Hooks

        AdaLoRA(**settings, target_modules=LINEAR).attach(model)
        hooks = Hooks(model)
        penalty, after_step = hooks.penalty, hooks.after_step
        learned: Callable[[], dict[str, Tensor]] = partial(dict, _ours(attached(model)["default"].parts))
    else:
        import peft

        config = peft.AdaLoraConfig(**settings, target_modules=list(LINEAR), task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
        penalty, after_step = partial(_peer_penalty, model.base_model), model.base_model.update_and_allocate
        learned = partial(_peers, model.base_model.rankallocator)
    trained = alike(model, NAMES, seed)
    if work == "penalty":
        return partial(_penalised, penalty, trained)
    generator = torch.Generator().manual_seed(seed + 2)
    for name in sorted(trained):
        trained[name].grad = torch.randn(trained[name].shape, generator=generator).to(device)
    steps = count()
    lambdas = {name: parameter for name, parameter in trained.items() if name.endswith("lora_E")}

    def step() -> dict[str, Tensor]:
        after_step(next(steps))
        return learned() if work == "importance" else dict(lambdas)

    return step


def _penalised(penalty: Callable[[], Tensor], trained: dict[str, Any]) -> dict[str, Tensor]:
    for parameter in trained.values():
        parameter.grad = None
    value = penalty()
    value.backward()
    return {"penalty": value.detach()} | {n: p.grad for n, p in trained.items() if p.grad is not None}


def _peer_penalty(adapted: Any) -> Tensor:
    """`AdaLoraModel.forward` around a model that has nothing to compute."""
    zero = torch.zeros((), device=next(adapted.parameters()).device)
    adapted.model.forward = lambda: SimpleNamespace(loss=zero)
    return type(adapted).forward(adapted).loss


def _ours(parts: list[Any]) -> dict[str, Tensor]:
    """The importances of some layers' Q, as views of what each step writes into."""
    from pefttutor.parts.importances import Importances
    from pefttutor.parts.part import of_kind

    (importances,) = of_kind(parts, Importances)
    values, (averages,) = importances.values, importances.added()
    split = averages.split([value.numel() for value in values], dim=1)
    places, found = [id(value) for value in values], {}
    for i, layer in list(enumerate(importances.layers))[::EVERY]:
        _, Q, _ = layer.triplets
        for name, of_Q in zip(("sensitivity", "uncertainty"), split[places.index(id(Q))], strict=True):
            found[f"{i}.{name}"] = of_Q.view_as(Q)
    return found


def _peers(allocator: Any) -> dict[str, Tensor]:
    found, names = {}, [name for name in allocator.exp_avg_ipt if "lora_A" in name]
    for i, name in list(enumerate(names))[::EVERY]:
        found[f"{i}.sensitivity"] = allocator.exp_avg_ipt[name]
        found[f"{i}.uncertainty"] = allocator.exp_avg_unc[name]
    return found


def _row(work: Work, what: str, goal: float) -> Row:
    return Row(
        name=f"adalora_{work}",
        work=f"{what}, 42 layers of {R} triplets",
        peer="HF PEFT, AdaLoraModel and RankAllocator",
        build=partial(build, work=work),
        goals={"time": goal},
        cuda_goals={"time": 1.0},
        rounds=31,
    )


ROWS = [
    _row("penalty", "AdaLoRA's orthogonality penalty, forward + backward", 0.06),
    _row("importance", "AdaLoRA's importances of a step", 0.08),
    _row("budget", "AdaLoRA's importances of a step, and the budget given out", 0.15),
]
