"""LT-SFT: fine-tune fully, see which entries moved most, rewind, and train only those.

K = the k largest |θ₁ − θ₀|,   θ ← θ₀,   then train θ_K:   φ = θ₂ − θ₀ has k entries
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pefttutor.kernels.flat_entries import read
from pefttutor.method import DEFAULT, Attachment, attached, attaching
from pefttutor.parts.called import check_called
from pefttutor.parts.choosing_again import settle_as
from pefttutor.parts.entries import VALUES, candidates, entries
from pefttutor.parts.freezing import Whole, train_everything
from pefttutor.parts.ranking import largest_share
from pefttutor.parts.settings import check_fraction, check_names, check_number

__all__ = ["LTSFT", "add_differences", "difference"]

# By the name of a parameter: flat places (k) and changes (k).
Difference = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class LTSFT:
    """Lottery-ticket sparse fine-tuning: two trainings, of which the first only chooses.

        method.attach(model);  pefttutor.fit(model, …)      # phase 1: everything trains
        method.rewind(model);  pefttutor.fit(model, …)      # phase 2: back to θ₀, k entries train

    >>> model = LTSFT(fraction=0.5).attach(nn.Linear(2, 1, bias=False))
    >>> model.weight.data += torch.tensor([[0.1, 5.0]])                 # phase 1 moves the second entry most
    >>> LTSFT(fraction=0.5).rewind(model).weight_index
    tensor([1], dtype=torch.int32)

    fraction: share of the entries, over all tensors but `modules_to_save`, that train in phase 2.
    modules_to_save: modules that train fully in both phases, such as a new head; they are rewound too.
    l1_weight: λ of the paper's penalty λ/N · Σ|θ − θ₀| over all N entries; here it is added in phase 1 alone.

    Cost: phase 1 costs what full fine-tuning does, and keeps θ₀ in buffers beside the weights, which aren't saved;
        phase 2 costs what `SparseFineTuning` does.
    Raises: ValueError for a fraction outside (0, 1] or a negative l1_weight.
    Source: Ansell et al. 2022, arXiv:2110.07560, section 3; chapter 4.3.2, which leaves the rewinding out.
    """

    fraction: float = 0.05
    modules_to_save: Collection[str] = ()
    l1_weight: float = 0.0

    def __post_init__(self) -> None:
        check_fraction(self)
        check_number(self, "l1_weight", least=0)
        check_names(self, "modules_to_save")

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Phase 1: let everything train.

        Raises: ValueError if the name is in use, for a wrong name of a module, or for a weight of which phase 2
            couldn't train a part.
        """
        with attaching(model, self, name) as new:
            check_called(model, candidates(model, self.modules_to_save))
            new.add(train_everything(model, beside=True))
        return model

    def rewind(self, model: nn.Module, *, name: str | None = None) -> nn.Module:
        """Phase 2: choose the entries that moved most, put θ₀ back bit for bit, and let only them train.

        `name` says which LTSFT is meant, where there are several.

        Raises: RuntimeError if phase 1 wasn't started with `attach`.
        """
        mine = [a for a in self._mine(model) if _first_phase(a) and name in (None, a.name)]
        if len(mine) != 1:
            raise RuntimeError(
                "rewind needs phase 1 before it: method.attach(model), train, method.rewind(model)."
            )
        start = _first_phase(mine[0])
        tensors = candidates(model, self.modules_to_save)
        scores = {n: (p.detach() - start[n]).abs() for n, p in tensors.items() if n in start}
        settle_as(
            model, mine[0], mine[0].parts, largest_share(scores, self.fraction), {}, self.modules_to_save
        )
        return model

    def penalty(self, model: nn.Module) -> Tensor:
        """What is added to the loss: λ · mean |θ − θ₀| in phase 1, else 0."""
        starts = [_first_phase(a) for a in self._mine(model) if a.learns] if self.l1_weight else []
        parameters = dict(model.named_parameters())
        trained = [(parameters[name], theta_0) for start in starts for name, theta_0 in start.items()]
        if not trained:
            return torch.zeros((), requires_grad=True)
        total = torch.stack([(p - theta_0).abs().sum() for p, theta_0 in trained]).sum()
        return self.l1_weight / sum(p.numel() for p, _ in trained) * total

    def _mine(self, model: nn.Module) -> list[Attachment]:
        return [a for a in attached(model).values() if a.method == self]


def _first_phase(attachment: Attachment) -> dict[str, Tensor]:
    """θ₀ by the name of each parameter in phase 1; empty otherwise."""
    parts = [part for part in attachment.parts if isinstance(part, Whole) and part.beside]
    return {name: start for part in parts for name, start in part.starts().items()}


def difference(model: nn.Module, start: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """What `model` has learned, φ = θ₂ − θ₀ at the entries that it has trained; `start` is the base it came from.

    >>> from copy import deepcopy
    >>> base = nn.Linear(2, 1, bias=False)
    >>> model = LTSFT(fraction=0.5).rewind(LTSFT(fraction=0.5).attach(deepcopy(base)))
    >>> difference(model, base)                                         # one of two entries, before phase 2
    {'weight': (tensor([0]), tensor([0.]))}

    Shapes: by the name of a parameter its flat places (k) and changes (k).
    """
    theta_0, theta_2 = dict(start.named_parameters()), dict(model.named_parameters())
    return {
        name: (index.long(), theta_2[name + VALUES].detach() - read(theta_0[name], index))
        for name, index in entries(model).items()
    }


def add_differences(model: nn.Module, *differences: Difference) -> nn.Module:
    """Add differences to a base in place, θ₀ + φ_task + φ_language + …, and return it.

    >>> base, phi = nn.Linear(2, 1, bias=False), {"weight": (torch.tensor([1]), torch.tensor([5.0]))}
    >>> _ = nn.init.zeros_(base.weight)
    >>> add_differences(base, phi, phi).weight.tolist()
    [[0.0, 10.0]]

    Raises: ValueError for a difference of another model.
    """
    parameters = dict(model.named_parameters())
    for phi in differences:
        for name, (places, _) in phi.items():
            if name not in parameters or (len(places) and int(places.max()) >= parameters[name].numel()):
                raise ValueError(
                    f"a difference for {name!r} doesn't fit this model; load the base it was made on."
                )
    with torch.no_grad():
        for phi in differences:
            for name, (places, change) in phi.items():
                parameters[name].view(-1).index_add_(0, places, change.to(parameters[name].dtype))
    return model
