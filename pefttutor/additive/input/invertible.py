"""Invertible adapters: change what the words of a language go in as, and take that back before words come out.

    y₁ = x₁ + F(x₂),  y₂ = x₂ + G(y₁)        and back        x₂ = y₂ − G(y₁),  x₁ = y₁ − F(x₂)

It is the part of MAD-X that stands at the embeddings; the adapters inside of the blocks are `Adapter`'s.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.bottleneck import draw_projections
from pefttutor.parts.coupling import Coupling, ends
from pefttutor.parts.freezing import fully_trained, train_fully
from pefttutor.parts.settings import check_names, check_number, check_whole
from pefttutor.parts.streams import Hooked

__all__ = ["InvertibleAdapter"]


@dataclass(frozen=True, kw_only=True)
class InvertibleAdapter:
    """An invertible change of the embeddings, whose inverse stands before the output embeddings.

    y₁ = x₁ + F(x₂), y₂ = x₂ + G(y₁)  before the first block, where x₁ and x₂ are the halves of a token's embedding;
    x₂ = y₂ − G(y₁), x₁ = y₁ − F(x₂)  before the output embeddings;  F(x) = W_u ReLU(W_d x + b_d) + b_u, G the same

    MAD-X learns a language and a task apart. The language is this and an `Adapter`, trained together on its text with
    the language model's own loss; the task is a second `Adapter` above it, and the language stays frozen meanwhile:

        model = InvertibleAdapter().attach(model, name="velan-words")         # fit both on text in Velan,
        model = Adapter(placement="pfeiffer", bottleneck=48).attach(model, name="velan")
        model = Adapter(placement="pfeiffer", bottleneck=8).attach(model, name="topic")       # and then the task
        pefttutor.switch(model, "velan-words", "velan", "topic", train=("topic",))
        pefttutor.switch(model, "german-words", "german", "topic")            # the same task in another language

    What is attached later acts around what was attached before it, so all languages are attached before the task. A
    file knows the model that it was saved from, with its head; onto a classifier on the same body a language's values
    are copied by their names, which are the same there.

    >>> from pefttutor.models import load
    >>> model, _ = load("campus-nano")
    >>> InvertibleAdapter().count(model)                                    # 2 · 128 · 32 + 2 · 32 + 128
    8384

    bottleneck: the features m in the middle of F and of G; None for d/4, as in the paper.
    modules_to_save: modules that train fully and are saved along, such as a new head ("classifier").
    init_std: None starts W_d and b_d as in a new linear layer and W_u and b_u at 0, so that the model starts as it
        was, exactly; a number draws both W from a normal within ± 2 std (the authors: 0.02, without the bounds).
    init_seed: fixes the random weights, whatever the device.

    It acts on what the first block gets, in an encoder with the positions added and normalised, as the authors' code
    has it; an encoder-decoder's two stacks and its head share one. A model without output embeddings, such as a
    classifier, predicts no words and needs no inverse: it has the change alone. Of two that take effect together the
    later one changes what the earlier one has made, and is taken back first. F and G are never inverted themselves, so
    any network could stand there; the determinant of the Jacobian is 1.

    Shapes: W_d (m, d/2), b_d (m), W_u (d/2, m), b_u (d/2), in the first block, for F and for G; d the block's width.
    Cost: it trains 2·d·m + 2·m + d values (`count`), for d = 768 and m = 192 296,064, and takes 4·d·m FLOPs more a
        token, twice that where there is an inverse; it can't be merged. Attaching takes a forward pass of three tokens.
    Raises: ValueError for a model that reads no tokens, an odd width, blocks that a text passes more than once, or
        output embeddings that don't read what the blocks are wide.
    Source: Pfeiffer et al. 2020, arXiv:2005.00052, section 3; coupling: Dinh et al. 2015, arXiv:1410.8516, NICE.
    """

    bottleneck: int | None = None
    modules_to_save: Collection[str] = ()
    init_std: float | None = None
    init_seed: int = 0

    def __post_init__(self) -> None:
        if self.bottleneck is not None:
            check_whole(self, "bottleneck")
        if self.init_std is not None:
            check_number(self, "init_std", above=0)
        check_whole(self, "init_seed", least=0)
        check_names(self, "modules_to_save")

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, put the change before its first block and the inverse before its head, and return it.

        Raises: ValueError if the name is in use, or the model can't have it. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            fully = train_fully(model, (), self.modules_to_save)
            found = ends(model)
            coupling = Coupling(found, name, self._drawn(found.width))
            new.add(coupling)
            before: list[Any] = [(block, coupling.enter) for block in found.firsts.values()]
            if found.head is None:
                new.add(Hooked(before))
            else:
                before.append((model, coupling.check_head))
                new.add(Hooked(before, taking_back=[(found.head, coupling.leave)]))
            for part in fully:
                new.add(part)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: 2·d·m + 2·m + d, and modules_to_save."""
        d = ends(model).width
        m = self._middle(d)
        fully, _ = fully_trained(model, self.modules_to_save)
        return 2 * d * m + 2 * m + d + sum(model.get_parameter(name).numel() for name in fully)

    def _middle(self, width: int) -> int:
        return self.bottleneck or max(1, width // 4)

    def _drawn(self, width: int) -> dict[str, Tensor]:
        """F's W_d, b_d, W_u and b_u, and then G's, by their keys."""
        generator = torch.Generator().manual_seed(self.init_seed)
        found: dict[str, Tensor] = {}
        for which in ("F", "G"):
            drawn = draw_projections(width // 2, self._middle(width), generator, self.init_std)
            found |= {key.replace("adapter", f"invertible_{which}"): value for key, value in drawn.items()}
        return found
