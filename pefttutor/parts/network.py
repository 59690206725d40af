"""What a trained tensor is made of in each step: itself, or a table that a small network transforms.

    mlp     W₂ tanh(W₁ t + b₁) + b₂,  or with relu and one layer more
    lstm    W₂ relu(W₁ [h→; h←] + b₁) + b₂,  h the states of a bidirectional LSTM that reads the table's rows

Such a network makes training smoother. Once it has been trained, what it makes can be kept and the network dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.data.trial import evaluating
from pefttutor.parts.added import Added
from pefttutor.parts.attachment import added_key, attachments, find

__all__ = ["Itself", "Made", "Maker", "Network", "settle"]


@dataclass(frozen=True)
class Itself:
    """A parameter as it is. `key`: what its module calls it."""

    key: str

    def __call__(self, module: nn.Module) -> Tensor:
        return module.get_parameter(self.key)


@dataclass(frozen=True, kw_only=True)
class Network:
    """A table's rows through a network, whose parameters lie in a module under names of their own.

    >>> network = Network(key="prompt", name="default", kind="mlp", rows=3, width=4, hidden=5, out=4, init_seed=0)
    >>> module = nn.Module()
    >>> for key, parameter in network.drawn(torch.ones(1)).items():
    ...     module.register_parameter(key, parameter)
    >>> network(module).shape, sum(p.numel() for p in module.parameters()) == network.count()
    (torch.Size([3, 4]), True)

    kind: "mlp" (tanh, two layers), "relu" (three) or "lstm" (`layers` of it, both directions, hidden in each).

    Shapes: the table (rows, width) → (rows, out).
    """

    key: str
    name: str
    kind: str
    rows: int
    width: int
    hidden: int
    out: int
    layers: int = 2
    dropout: float = 0.0
    init_seed: int

    def drawn(self, beside: Tensor) -> dict[str, Tensor]:
        """Its parameters at their start, by their keys: the table standard normal, layers as torch draws them.

        They lie where `beside` does, and are as wide, in float32 at least.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.init_seed)
            table = torch.randn(self.rows, self.width)
            layers = dict(self._build().named_parameters())
        wide = torch.promote_types(beside.dtype, torch.float32)
        return {
            self._at(name): nn.Parameter(tensor.detach().to(beside.device, wide))
            for name, tensor in [("table", table), *layers.items()]
        }

    def __call__(self, module: nn.Module) -> Tensor:
        layers = _without_values(self).train(module.training)
        names = [name for name, _ in layers.named_parameters()]
        given: dict[str, Tensor] = {name: module.get_parameter(self._at(name)) for name in names}
        table = module.get_parameter(self._at("table"))
        # Not in autocast's half, in which torch knows no LSTM on every processor. Without values there is no autocast.
        with nullcontext() if table.is_meta else torch.autocast(table.device.type, enabled=False):
            made: Tensor = torch.func.functional_call(layers, given, (table[None],))[0]
        return made

    def count(self) -> int:
        """How many values it has, with its table."""
        return self.rows * self.width + sum(p.numel() for p in _without_values(self).parameters())

    def _at(self, name: str) -> str:
        return added_key(f"{self.key}_{name.replace('.', '_')}", self.name)

    def _build(self) -> nn.Module:
        if self.kind == "lstm":
            return _ReadBothWays(self.width, self.hidden, self.out, self.layers, self.dropout)
        first, last = nn.Linear(self.width, self.hidden), nn.Linear(self.hidden, self.out)
        if self.kind == "mlp":
            return nn.Sequential(first, nn.Tanh(), last)
        return nn.Sequential(first, nn.ReLU(), nn.Linear(self.hidden, self.hidden), nn.ReLU(), last)


class _ReadBothWays(nn.Module):
    def __init__(self, width: int, hidden: int, out: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True)
        self.head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, out))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


@lru_cache(maxsize=32)
def _without_values(network: Network) -> nn.Module:
    """The network's form, which is called with the parameters that lie elsewhere."""
    with torch.device("meta"):
        return network._build()


# ---- the part, and how the network is dropped


@dataclass(eq=False)
class Maker:
    """What makes the tensor at the moment. Hooks share it with the part; it holds no module."""

    make: Itself | Network

    def __call__(self, module: nn.Module) -> Tensor:
        return self.make(module)


class Made(Added):
    """The parameters of a tensor that is made in each step, all in one module."""

    def __init__(self, tensors: Iterable[tuple[nn.Module, str, str, Tensor]], maker: Maker) -> None:
        super().__init__(tensors)
        self.maker = maker

    def settle(self, key: str) -> None:
        """Keep what is made at the moment as the parameter `key`, in place of what makes it."""
        (name, (module, _)), *_ = self.places.items()
        with torch.no_grad(), evaluating(module):
            made = nn.Parameter(self.maker(module).clone())
        self.remove()
        module.register_parameter(key, made)
        self.places = {f"{name.rpartition('.')[0]}.{key}".lstrip("."): (module, key)}
        self.maker.make = Itself(key)


@torch.inference_mode(mode=False)  # what is kept could never be trained
def settle(model: nn.Module, name: str | None, key: str, dropped: Callable[[Any], Any]) -> nn.Module:
    """Drop an attachment's network and keep what it makes; `dropped` gives the method that has none.

    Raises: ValueError if there is no such attachment, or it has no network.
    """
    attachment = find(model, name)
    made = [
        part for part in attachment.parts if isinstance(part, Made) and isinstance(part.maker.make, Network)
    ]
    if not made:
        raise ValueError(f"{attachment.name!r} ({type(attachment.method).__name__}) has no network to drop.")
    for part in made:
        part.settle(added_key(key, attachment.name))
    attachment.method = dropped(attachment.method)
    attachments(model).apply(model)  # type: ignore[union-attr]
    return model
