"""LoRAHub: LoRAs that were trained for other tasks are added up for a new one, with weights found without gradients.

    ΔW = s · (Σ wᵢ Bᵢ)(Σ wᵢ Aᵢ)          "factors", as the released code composes
    ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ                   "deltas", the weighted sum of what the plug-ins do

All that is learned are N numbers, few enough for a search that asks for nothing but the loss on a handful of examples.
The two aren't the same: the first has w² where the second has w, so that a plug-in alone can't be subtracted, and it
has the products wᵢ wⱼ Bᵢ Aⱼ, of factors that have never seen each other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.method import DEFAULT, Attachment, attached, attaching, find, find_own
from pefttutor.parts.added import Shared
from pefttutor.parts.freezing import fully_trained, train_fully
from pefttutor.parts.lowrank_layer import Factored, LowRank
from pefttutor.parts.part import of_kind
from pefttutor.parts.searching import search
from pefttutor.parts.settings import check_choice, check_names, check_number, check_whole

__all__ = ["LoRAHub"]

WEIGHTS = "lorahub_weights"
COMBINE = ("factors", "deltas")


@dataclass(frozen=True, kw_only=True)
class LoRAHub:
    """A weighted sum of LoRAs that the model carries already.

        for name, folder in plugins.items():
            pefttutor.load(model, folder, name=name)
        hub = LoRAHub(plugins=tuple(plugins));  hub.attach(model)
        losses = hub.search(model, lambda model: loss_on_the_few_examples(model))

    >>> from pefttutor import LoRA
    >>> model = nn.Sequential(nn.Linear(6, 4))
    >>> for name in ("a", "b", "c"):
    ...     model = LoRA(r=2, target_modules=("0",)).attach(model, name=name)
    >>> LoRAHub(plugins=("a", "b", "c")).count(model)
    3

    plugins: the names of the attachments to add up, plain LoRAs of one base, at the same layers. They are frozen and
        switched off: they act through the sum alone. A head that one of them has trained stays out of it.
    combine: "factors" or "deltas", as above; for "factors" all need one rank and one s.
    modules_to_save: modules that train fully and are saved along; the search leaves them as they are.

    All weights start at 0, and the model as it was. They are a parameter, so that they can be trained by gradients as
    well; with "factors" the gradient at 0 is 0. `pefttutor.as_lora` makes one LoRA of the sum.

    Shapes: w (N).
    Cost: it trains N values (`count`). A step forms the sum of the factors, 2·N·r·(in + out) FLOPs a layer, and a token
        takes 2·r·(in + out) more, with "deltas" N times as many; none once merged.
    Raises: ValueError for a name that isn't there, for what isn't a plain LoRA, and for LoRAs that don't go together.
    Source: Huang et al. 2023, arXiv:2307.13269, section 3, and the authors' code.
    """

    plugins: Collection[str] = ()
    combine: str = "factors"
    modules_to_save: Collection[str] = ()

    def __post_init__(self) -> None:
        check_choice(self, "combine", COMBINE)
        if isinstance(self.plugins, str):
            raise ValueError(f"plugins is a string; write ({self.plugins!r},).")
        check_names(self, "plugins", "modules_to_save")
        twice = [name for name in self.plugins if list(self.plugins).count(name) > 1]
        if twice:
            raise ValueError(f"plugins names {twice[0]!r} twice; each can be added once, with any weight.")

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model` with its plug-ins, put their weighted sum at each of their layers, and return it.

        Raises: ValueError if the name is in use, or these plug-ins can't be added up. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            new.reads = tuple(self.plugins)
            fully, places = train_fully(model, (), self.modules_to_save), self._places(model)
            first = next(iter(places.values()))[0]
            weights = nn.Parameter(torch.zeros(len(self.plugins)).to(first.trained()[0]))
            shared = Shared(model, name, {WEIGHTS: weights})
            new.add(shared)
            for path, parts in places.items():
                new.add(Composed(path, parts, name, self, shared))
            for part in fully:
                new.add(part)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, on a model that carries the plug-ins: one for each, and modules_to_save."""
        self._places(model)
        fully, _ = fully_trained(model, self.modules_to_save)
        return len(self.plugins) + sum(model.get_parameter(name).numel() for name in fully)

    def weights(self, model: nn.Module, *, name: str | None = None) -> dict[str, float]:
        """The weight of each plug-in. name: of the attachment, where there are several."""
        return dict(zip(self.plugins, self._held(model, name).tolist(), strict=True))

    def search(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module], Any],
        *,
        steps: int = 40,
        optimizer: str = "NGOpt",
        bound: float = 1.5,
        l1: float = 0.05,
        seed: int = 42,
        name: str | None = None,
    ) -> list[float]:
        """Search weights within ±bound that make loss(model) + l1 · mean |w| small; return that of every try.

        loss: called with the model in eval mode and without gradients, such as the mean cross-entropy of the few
            examples. (The released code divides it by their number once more, so that there l1 counts as much more.)
        optimizer: one of nevergrad's; the paper names "Shiwa", and the released code takes "NGOpt".
        name: of the attachment, where there are several.

        The model is left with the weights that the optimizer recommends, and in the mode in which it was.

        Cost: steps calls of `loss`. It needs nevergrad: pip install "pefttutor[search]".
        Raises: ValueError for settings that make no sense, and where loss gives what isn't a finite number;
            ModuleNotFoundError without nevergrad. The weights are then as they were.
        """
        _Search(steps=steps, bound=bound, l1=l1, seed=seed)
        weights, modes = self._held(model, name), [(module, module.training) for module in model.modules()]

        def cost() -> float:
            return float(loss(model)) + l1 * float(weights.abs().mean())

        model.eval()
        try:
            return search(weights, cost, steps=steps, optimizer=optimizer, bound=bound, seed=seed)
        finally:
            for module, training in modes:
                module.training = training

    def _held(self, model: nn.Module, name: str | None) -> Tensor:
        attachment = find_own(model, self, name, changing="weights")
        return of_kind(attachment.parts, Shared)[0].trained()[0]

    def _places(self, model: nn.Module) -> dict[str, list[LowRank]]:
        """The plug-ins' changes at each layer, by the layer's name."""
        if not self.plugins:
            names = tuple(n for n, a in attached(model).items() if _loras(a))
            raise ValueError(
                f"plugins is empty; name those to add up, attached before. This model has {names or 'none'}."
            )
        found = {name: _plugin(find(model, name)) for name in self.plugins}
        first, *others = self.plugins
        for name in others:
            apart = sorted(found[first].keys() ^ found[name].keys())
            if apart:
                raise ValueError(
                    f"{first!r} and {name!r} stand at different layers: only one of them is at {apart[0]!r} "
                    f"({len(apart)} such layers). Add up LoRAs of one target_modules."
                )
        places = {path: [found[name][path] for name in self.plugins] for path in found[first]}
        if self.combine == "factors":
            _check_alike(self.plugins, places)
        return places


@dataclass(frozen=True)
class _Search:
    steps: int
    bound: float
    l1: float
    seed: int

    def __post_init__(self) -> None:
        check_whole(self, "steps")
        check_number(self, "bound", above=0)
        check_number(self, "l1", least=0)
        check_whole(self, "seed", least=0)


class Composed(Factored):
    """The plug-ins of one layer, added up: y = f(x) + x ΔWᵀ."""

    def __init__(self, path: str, parts: list[LowRank], name: str, method: LoRAHub, shared: Shared) -> None:
        """`parts`: the plug-ins' changes. `shared`: their weights."""
        self.plugins, self.together, self.shared = tuple(method.plugins), method.combine == "factors", shared
        self.r = parts[0].r if self.together else sum(part.r for part in parts)
        scaling = parts[0].scaling if self.together else 1.0
        super().__init__(path, parts[0].layer, name, {}, scaling=scaling)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), or side by side A (Σ r, in) and B (out, Σ r)."""
        changes: Mapping[str, Any] = vars(self.layer)["_changes"]
        parts = [changes[name] for name in self.plugins]
        A, B = (list(each) for each in zip(*(part.factors for part in parts), strict=True))
        (w,) = self.shared.get(WEIGHTS, device=A[0].device)
        if self.together:
            return tuple(torch.einsum("n,nij->ij", w, torch.stack(each)) for each in (A, B))  # type: ignore[return-value]
        return torch.cat(A), torch.cat([w[i] * part.scaling * B[i] for i, part in enumerate(parts)], 1)


def _loras(attachment: Attachment) -> dict[str, LowRank]:
    """The attachment's plain low-rank changes by the name of their layer."""
    return {part.path: part for part in attachment.parts if type(part) is LowRank}


def _plugin(attachment: Attachment) -> dict[str, LowRank]:
    """The changes of a plug-in. Raises: ValueError, with the reason, for what isn't one."""
    found = _loras(attachment)
    if not found:
        raise ValueError(
            f"{attachment.name!r} ({type(attachment.method).__name__}) is no plain LoRA, and LoRAHub adds up these: "
            "pefttutor.as_lora(model, r=…) makes a LoRA of it."
        )
    return found


def _check_alike(names: Collection[str], places: Mapping[str, list[LowRank]]) -> None:
    """Raise ValueError unless the factors of all plug-ins can be added."""
    for path, parts in places.items():
        for name, part in zip(names, parts, strict=True):
            for what, one, other in (("rank", parts[0].r, part.r), ("s", parts[0].scaling, part.scaling)):
                if one != other:
                    raise ValueError(
                        f"at {path!r} the plug-in {next(iter(names))!r} has the {what} {one:g} and {name!r} {other:g}, "
                        "and their factors can't be added: take combine='deltas', or plug-ins of one rank and "
                        "lora_alpha."
                    )
