"""Checks of notebook 00: count what trains, train only what should, count right answers only where there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.check.compare import same_result
from pefttutor.check.core import exercise
from pefttutor.check.freezing import check_freezing, train_only

# ---- 00.1


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all numbers, numbers that train), each parameter once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


class _Tied(nn.Module):
    """A small language model: head tied to the embedding, a buffer, a layer in a layer, and most of it frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.block = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))})
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", torch.arange(5.0))


def _frozen(trained: tuple[str, ...]) -> nn.Module:
    model = _Tied()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _pair(parameters: Iterable[Tensor]) -> tuple[int, int]:
    listed = list(parameters)
    return _count(listed), _count(p for p in listed if p.requires_grad)


def _every_name(model: nn.Module) -> list[nn.Parameter]:
    return [p for _, p in model.named_parameters(remove_duplicate=False)]


COUNTING: dict[str, Callable[[Any], Any]] = {
    "a tied weight is counted under each of its names": lambda model: _pair(_every_name(model)),
    "it counts tensors; a tensor holds p.numel() numbers": lambda model: (
        len(list(model.parameters())),
        sum(p.requires_grad for p in model.parameters()),
    ),
    "requires_grad isn't asked: the second number counts what is frozen, too": lambda model: (
        _count(model.parameters()),
        _count(model.parameters()),
    ),
    "the second number counts what is frozen": lambda model: (
        _count(model.parameters()),
        _count(p for p in model.parameters() if not p.requires_grad),
    ),
    "the two numbers are swapped": lambda model: _pair(model.parameters())[::-1],
    "p.data and state_dict() hold no requires_grad: what they give looks frozen": lambda model: (
        _count(model.parameters()),
        0,
    ),
    "buffers are counted; they are no parameters": lambda model: (
        _count([*model.parameters(), *model.buffers()]),
        _pair(model.parameters())[1],
    ),
    "state_dict() repeats tied weights and holds buffers": lambda model: (
        _count(model.state_dict().values()),
        _pair(model.parameters())[1],
    ),
    "biases and other vectors are left out": lambda model: _pair(p for p in model.parameters() if p.ndim > 1),
    "only the layers nn.Linear are counted": lambda model: _pair(
        {p: None for layer in model.modules() if isinstance(layer, nn.Linear) for p in layer.parameters()}
    ),
    "len(p) is the number of rows, not of numbers": lambda model: (
        sum(len(p) for p in model.parameters()),
        sum(len(p) for p in model.parameters() if p.requires_grad),
    ),
}


@exercise("00.1", reference=count_parameters)
def ex00_1(attempt: Callable[[nn.Module], Any]) -> None:
    """All parameters and trained ones, on models with a tied head, a buffer and frozen parts."""
    for trained in (
        ("embed.weight", "block.mlp.0.bias", "norm.weight"),
        ("block.mlp.0.weight", "block.mlp.2.bias"),
    ):
        same_result(attempt, count_parameters, {"model": _frozen(trained)}, mistakes=COUNTING)


# ---- 00.2


@exercise("00.2", reference=train_only)
def ex00_2(attempt: Callable[..., Any]) -> None:
    """What requires a gradient, what the optimizer holds, and what one step with weight decay changes."""
    check_freezing(attempt)


# ---- 00.3

IGNORED = -100


def token_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of right predictions: position t predicts label t + 1, and labels of −100 don't count."""
    predicted, labels = logits[:, :-1].argmax(-1), labels[:, 1:]  # (batch, seq − 1)
    counted = labels != IGNORED
    return ((predicted == labels) & counted).sum().item() / counted.sum().item()


def _share(right: Tensor, counted: Tensor) -> float:
    return (right & counted).sum().item() / counted.sum().item()


def _row_mean(logits: Tensor, labels: Tensor) -> float:
    labels, counted = labels[:, 1:], labels[:, 1:] != IGNORED
    right = (logits[:, :-1].argmax(-1) == labels) & counted
    return (right.sum(1) / counted.sum(1)).mean().item()


def _all_places(logits: Tensor, labels: Tensor) -> float:
    return (logits[:, :-1].argmax(-1) == labels[:, 1:]).float().mean().item()


def _whole_rows(logits: Tensor, labels: Tensor) -> float:
    right = (logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == IGNORED)
    return right.all(1).float().mean().item()


ACCURACY: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "no shift: position t predicts the token at t + 1": lambda logits, labels: _share(
        logits.argmax(-1) == labels, labels != IGNORED
    ),
    "shifted the wrong way: logits[:, 1:] stands against labels[:, :-1]": lambda logits, labels: _share(
        logits[:, 1:].argmax(-1) == labels[:, :-1], labels[:, :-1] != IGNORED
    ),
    "labels of −100 are in the denominator: they count as wrong": _all_places,
    "labels of −100 count as right": lambda logits, labels: (
        ((logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == IGNORED)).float().mean().item()
    ),
    "a mean over rows: short rows weigh as much as long ones": _row_mean,
    "argmax over the wrong axis: the classes are the last one": lambda logits, labels: _share(
        logits[:, :-1].argmax(1)[:, :1].expand_as(labels[:, 1:]) == labels[:, 1:], labels[:, 1:] != IGNORED
    ),
    "label 0 is taken for padding; here what is ignored is −100": lambda logits, labels: _share(
        logits[:, :-1].argmax(-1) == labels[:, 1:], labels[:, 1:] > 0
    ),
    "it counts the right ones; divide by how many were asked": lambda logits, labels: (
        (logits[:, :-1].argmax(-1) == labels[:, 1:]).sum().item()
    ),
    "it is the share of wrong ones": lambda logits, labels: 1 - token_accuracy(logits, labels),
    "it asks whether a whole row is right": _whole_rows,
}


def _as_number(attempt: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor that holds one number is as good as the number."""

    def wrapped(logits: Tensor, labels: Tensor) -> Any:
        came = attempt(logits, labels)
        return float(came) if isinstance(came, Tensor) and came.ndim == 0 else came

    return wrapped


def draws(seed: int) -> dict[str, Tensor]:
    """Three rows of unlike length, prompt and padding ignored, class 0 among the labels, about half of it right."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 9, 5, generator=generator)
    labels = torch.randint(0, 5, (3, 9), generator=generator)
    right = torch.rand(3, 9, generator=generator) < 0.5
    labels[:, 1:] = torch.where(right[:, 1:], logits[:, :-1].argmax(-1), labels[:, 1:])
    labels[0, :2] = labels[1, :5] = labels[2, :4] = labels[1, 7:] = IGNORED  # prompts; padding
    return {"logits": logits, "labels": labels}


@exercise("00.3", reference=token_accuracy)
def ex00_3(attempt: Callable[..., Any]) -> None:
    """The next token's accuracy on rows with a prompt and padding."""
    for seed in (0, 1, 2):
        same_result(_as_number(attempt), token_accuracy, draws(seed), mistakes=ACCURACY)
