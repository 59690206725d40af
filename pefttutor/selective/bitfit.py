"""BitFit: train the biases, nothing else.

y = W₀ x + b          b trains, W₀ doesn't
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.freezing import train_fully, whole
from pefttutor.parts.modules import find_modules
from pefttutor.parts.settings import check_names

__all__ = ["BitFit"]


@dataclass(frozen=True, kw_only=True)
class BitFit:
    """Train every bias of the model: of linear layers, of LayerNorms (their β), and nothing else.

    >>> model = BitFit().attach(nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)))
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['0.bias', '1.bias']

    target_modules: only the biases of these modules train, such as ("query", "intermediate.dense"), which the paper
        finds to be nearly as good; None means all.
    modules_to_save: modules that train fully and are saved along, such as a new head ("classifier").

    A bias moves all inputs alike, so the usual learning rate is about 100 times that of full fine-tuning. The bias of
    an attention's keys gets no gradient at all: it adds the same number to all scores of a row, and softmax doesn't
    see it.

    Shapes: a bias has one value for each output of its layer.
    Cost: it trains 0.08 to 0.09 % of BERT's values (`count`), without extra FLOPs, and there is nothing to merge.
    Raises: ValueError on a model without biases, such as Llama; there LoRA or LayerNormTuning is the small choice.
    Source: Ben Zaken et al. 2022, arXiv:2106.10199; chapter 4.3.1.
    """

    target_modules: str | Collection[str] | None = None
    modules_to_save: Collection[str] = ()

    def __post_init__(self) -> None:
        check_names(self, "target_modules", "modules_to_save")

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model` but for its biases and return it. Raises: ValueError if the name is in use."""
        with attaching(model, self, name) as new:
            for part in train_fully(model, self._biases(model), self.modules_to_save):
                new.add(part)
        return model

    def count(self, model: nn.Module) -> int:
        """How many biases train, without `modules_to_save`."""
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        return sum(sizes[name] for name in self._biases(model))

    def _biases(self, model: nn.Module) -> list[str]:
        names = [name for name in whole(model) if name.rpartition(".")[2].endswith("bias")]
        if not names:
            raise ValueError(
                "BitFit: this model has no bias (Llama's and Mistral's linear layers and RMSNorms have none). "
                "Take LayerNormTuning, LoRA, or a model with biases."
            )
        if self.target_modules is not None:
            targets = find_modules(model, self.target_modules)
            names = [name for name in names if name.rpartition(".")[0] in targets]
            if not names:
                raise ValueError(f"BitFit: none of {', '.join(targets)} has a bias.")
        return names
