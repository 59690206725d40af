"""Exercise 00.2: train one part of a model. What is right, and the classic mistakes by what they leave behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.check.core import call, wrong


def train_only(model: nn.Module, part: str, lr: float) -> torch.optim.AdamW:
    """Freeze everything but the module called `part`; an AdamW over exactly what trains."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    for parameter in model.get_submodule(part).parameters():
        parameter.requires_grad_(True)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


class _Classifier(nn.Module):
    """`score` is to be trained; `score_norm` only sounds like it, and `body.score` lies elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"inner": nn.Linear(4, 5), "score": nn.Linear(5, 5)})
        self.score_norm = nn.LayerNorm(5)
        self.score = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body["score"](self.body["inner"](x).tanh())
        return self.score(self.score_norm(h))


def _used_before() -> _Classifier:
    """A model as it comes out of another run: gradients left in it, and its head frozen."""
    torch.manual_seed(3)
    model = _Classifier().eval()
    _loss(model).backward()
    model.score.weight.requires_grad_(False)
    return model


def _loss(model: nn.Module) -> Tensor:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    return nn.functional.cross_entropy(model(x), torch.tensor([0, 2, 1, 1, 0, 2]))


def check_freezing(attempt: Callable[..., Any]) -> None:
    """Exercise 00.2: what requires a gradient, what the optimizer holds, and what one step changes."""
    with torch.random.fork_rng(devices=[]):
        model = _used_before()
    before, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    case = "a classifier with body, score_norm and score; part 'score', lr 0.1"
    optimizer = call(attempt, model, "score", 0.1)
    _same_model(model, parameters, before, case)
    _right_flags(model, case)
    _right_optimizer(model, optimizer, case)
    _right_step(model, optimizer, before, case)


def _trains(name: str) -> bool:
    return name.startswith("score.")


def _same_model(model: nn.Module, parameters: dict[str, Any], before: dict[str, Tensor], case: str) -> None:
    now = dict(model.named_parameters())
    replaced = [name for name in parameters if now.get(name) is not parameters[name]]
    if replaced:
        raise wrong(
            input=case,
            expected="the model's own parameters",
            came=f"{', '.join(replaced)} replaced or removed",
            likely="a new layer or nn.Parameter was made; freezing only needs requires_grad_",
        )
    changed = [name for name in parameters if not torch.equal(now[name], before[name])]
    if changed or model.training:
        raise wrong(
            input=case,
            expected="the same numbers and the same mode as before; training comes later",
            came=f"changed: {', '.join(changed) or 'the mode, by model.train()'}",
            likely="the function trains, or draws numbers anew",
        )


def _right_flags(model: nn.Module, case: str) -> None:
    parameters = dict(model.named_parameters())
    came = [name for name, p in parameters.items() if p.requires_grad]
    expected = [name for name in parameters if _trains(name)]
    if came == expected:
        return
    on_modules = [name for name, module in model.named_modules() if "requires_grad" in vars(module)]
    spare, lacking = [n for n in came if n not in expected], [n for n in expected if n not in came]
    likely = None
    if on_modules:
        likely = "`module.requires_grad = …` sets a new attribute on the module; its parameters never see it"
    elif not came:
        likely = "everything is frozen: freeze first, then open the part again"
    elif came == [n for n in parameters if not _trains(n)]:
        likely = "it is the wrong way round: the part is frozen and the rest trains"
    elif spare and all("score" in name for name in spare):
        likely = (
            "the name is compared as text ('score' is in 'score_norm', too); ask for the module of that name"
        )
    elif lacking == ["score.weight"] and not spare:
        likely = "a weight that was frozen before isn't opened again"
    elif lacking == ["score.bias"]:
        likely = "the part's bias is forgotten"
    elif not lacking:
        likely = "the rest isn't frozen: what the optimizer doesn't hold still gets a gradient, at full cost"
    raise wrong(
        input=case, expected=f"trains: {', '.join(expected)}",
        came=f"trains: {', '.join(came) or 'nothing'}", likely=likely,
    )  # fmt: skip


def _right_optimizer(model: nn.Module, optimizer: Any, case: str) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        likely = "the function doesn't return its optimizer" if optimizer is None else None
        raise wrong(
            input=case, expected="a torch.optim.AdamW", came=f"a {type(optimizer).__name__}", likely=likely
        )
    if not isinstance(optimizer, torch.optim.AdamW) or optimizer.param_groups[0]["lr"] != 0.1:
        lr = optimizer.param_groups[0]["lr"]
        came = f"{type(optimizer).__name__} with lr {lr:g}"
        raise wrong(input=case, expected="AdamW with lr 0.1", came=came, likely="lr isn't passed on")
    held = [p for group in optimizer.param_groups for p in group["params"]]
    names = {p: name for name, p in model.named_parameters()}
    expected = {p for p, name in names.items() if _trains(name)}
    if set(held) != expected:
        if set(held) == set(names):
            likely = "the optimizer gets model.parameters(): all of them, whatever is frozen"
        else:
            likely = "the optimizer was built before freezing, from what trained then"
        raise wrong(
            input=case,
            expected=f"an optimizer that holds {', '.join(sorted(names[p] for p in expected))}",
            came=f"one that holds {', '.join(sorted(names.get(p, 'a tensor from elsewhere') for p in held))}",
            likely=likely,
        )


def _right_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, before: dict[str, Tensor], case: str
) -> None:
    """One step must be that of a fresh start: the gradient of this loss alone."""
    stale = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    if stale:
        raise wrong(
            input=f"{case}; gradients of an earlier run are still in it",
            expected="no gradient left over",
            came=f"an old gradient in {', '.join(stale)}",
            likely="parameter.grad = None is missing: backward() adds to what is there",
        )
    _loss(model).backward()
    optimizer.step()
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    if moved != [name for name in before if _trains(name)]:
        raise wrong(
            input=f"{case}; then one step",
            expected="score.weight and score.bias have moved",
            came=f"moved: {', '.join(moved) or 'nothing'}",
        )
