"""AdaMix: several adapters in the place of one; each step of training draws one of them, and in the end their mean is
kept.

    training     h ← h + σ(h W_dⁱ + b_dⁱ) W_u + b_u          i drawn for each adapter and each forward pass
    afterwards   h ← h + σ(h W̄_d + b̄_d) W_u + b_u            W̄_d = Σᵢ W_dⁱ / M

It trains M adapters' values, and keeps, reads and stores one adapter's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.data.targets import IGNORED, aligned, predicts_next
from pefttutor.method import DEFAULT, attaching, find
from pefttutor.parts.adapter_places import adapter_places, check_narrow
from pefttutor.parts.attachment import attachments
from pefttutor.parts.bottleneck import ACTIVATIONS, Bottleneck, draw_projections, width_of
from pefttutor.parts.freezing import fully_trained, train_fully
from pefttutor.parts.settings import check_choice, check_names, check_number, check_whole

__all__ = ["AdaMix"]

MATRICES = ("down", "up")


@dataclass(frozen=True, kw_only=True)
class AdaMix:
    """A mixture of bottleneck adapters, one of which is drawn in each step, and whose weights are averaged.

    h ← h + σ(h W_dᵢᵀ + b_dᵢ) W_uⱼᵀ + b_uⱼ, i and j drawn evenly among M; in evaluation with the means over i and j

    >>> model = nn.ModuleDict({"down_proj": nn.Linear(40, 24)})
    >>> AdaMix(bottleneck=5, experts=4, target_modules=("down_proj",)).count(model)     # 4 · (5 · 24 + 5) + 5 · 24 + 24
    644

        model = AdaMix().attach(model)
        pefttutor.fit(model, train, loss=AdaMix().loss)            # the consistency of two draws
        model = AdaMix().average(model)                            # the mean alone is left

    experts: how many, M; 1 is an `Adapter`. share: which matrix all experts have in common, with its bias: "up", as
        the authors', "down" or "none".
    placement: "pfeiffer" (after the feed-forward) or "houlsby" (after every sublayer). bottleneck: the features m in
        the middle; the authors have d / 16. activation: σ: gelu, relu, silu or tanh. target_modules: as in `Adapter`.
    consistency: the weight of the divergences in `loss`; the authors have 1, and 100 for generation.
    modules_to_save: modules that train fully and are saved along, such as a new head ("classifier").
    init_seed: fixes the random weights, whatever the device. Which expert is drawn follows torch's own seed.

    Each W_d starts as in a new linear layer and W_u at 0, so the model starts as it was. Only in training mode are
    experts drawn: in evaluation the model is that of the mean already. What isn't drawn gets a gradient of zero.

    The mean of the weights isn't the mean of what the experts say, but for a matrix after the nonlinearity: there both
    are the same.

    Shapes: W_d (M, m, d), b_d (M, m), W_u (d, m), b_u (d); with share="down" and "none" accordingly.
    Cost: it trains M·(m·d + m) + m·d + d values an adapter (`count`), and takes the FLOPs of one adapter in a pass;
        `loss` takes two passes. It can't be merged into the model's weights.
    Raises: ValueError for a name that finds nothing, a bottleneck above the width, or a model whose sublayers aren't
        found.
    Source: Wang et al. 2022, arXiv:2205.12410, section 3.
    """

    placement: str = "pfeiffer"
    bottleneck: int = 48
    experts: int = 4
    share: str = "up"
    activation: str = "gelu"
    target_modules: str | Collection[str] | None = None
    consistency: float = 1.0
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self, "placement", ("pfeiffer", "houlsby"))
        check_whole(self, "bottleneck")
        check_whole(self, "experts")
        check_choice(self, "share", ("up", "down", "none"))
        check_choice(self, "activation", tuple(ACTIVATIONS))
        check_number(self, "consistency", least=0)
        check_whole(self, "init_seed", least=0)
        check_names(self, "target_modules", "modules_to_save")

    def attach(self, model: nn.Module, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, put the experts in, and return it.

        Raises: ValueError if the name is in use or a layer can't be adapted. The model is then as it was.
        """
        with attaching(model, self, name) as new:
            fully = train_fully(model, (), self.modules_to_save)
            generator = torch.Generator().manual_seed(self.init_seed)
            for path, layer in self._places(model).items():
                new.add(Mixed(path, layer, name, self._drawn(layer, generator), activation=self.activation))
            for part in fully:
                new.add(part)
        return model

    def average(self, model: nn.Module, *, name: str | None = None) -> nn.Module:
        """After training: keep the mean of the experts in their place. In evaluation the model says what it said.

        name: the attachment's, where there are several. Raises: ValueError if it isn't an AdaMix.
        """
        attachment = find(model, name)
        if not isinstance(attachment.method, AdaMix):
            raise ValueError(
                f"{attachment.name!r} is a {type(attachment.method).__name__}, which has no experts to average."
            )
        for part in attachment.parts:
            if isinstance(part, Mixed):
                part.average()
        attachment.method = replace(attachment.method, experts=1)
        attachments(model).apply(model)  # type: ignore[union-attr]
        return model

    def loss(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """The model's loss in one pass, and how far two passes with other experts are apart, for `fit(loss=…)`.

        loss = CE(p) + consistency · ½ [KL(p‖q) + KL(q‖p)], the first of each pair a constant

        p and q are what both passes say where there is a label, and the divergence is the mean over these places.

        Shapes: a batch with labels → ().
        Raises: ValueError for a batch without labels.
        """
        if batch.get("labels") is None:
            raise ValueError(f"AdaMix.loss: the batch has {sorted(batch)}, expected 'labels' among them.")
        first, second = model(**batch), model(**batch)
        shifted, said = predicts_next(model, batch), []
        for output in (first, second):
            logits, labels = aligned(output.logits, batch["labels"], shifted=shifted)
            said.append(logits[labels != IGNORED].float().log_softmax(-1))
        p, q = said
        apart = [(a.detach().exp() * (a.detach() - b)).sum(-1).mean() for a, b in ((p, q), (q, p))]
        return first.loss + self.consistency * (apart[0] + apart[1]) / 2

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: those of all experts, and modules_to_save."""
        m, M = self.bottleneck, self.experts
        down, up = (M if self.share != which else 1 for which in MATRICES)
        widths = [width_of(layer) for layer in self._places(model).values()]
        own = sum(down * (m * d + m) + up * (m * d + d) for d in widths)
        fully, _ = fully_trained(model, self.modules_to_save)
        return own + sum(model.get_parameter(name).numel() for name in fully)

    def _places(self, model: nn.Module) -> dict[str, nn.Module]:
        layers = adapter_places(model, self.placement, self.target_modules, self.modules_to_save)
        check_narrow(layers, self.bottleneck)
        return layers

    def _drawn(self, layer: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """The experts' matrices and biases, one upon the other; what is shared is the first one's."""
        drawn = [draw_projections(width_of(layer), self.bottleneck, generator) for _ in range(self.experts)]
        stacked = {}
        for key in drawn[0]:
            every = [each[key] for each in drawn]
            shared = key.startswith(f"adapter_{self.share}")
            stacked[key.replace("adapter", "adamix")] = every[0] if shared else torch.stack(every)
        return stacked


class Mixed(Bottleneck):
    """A bottleneck adapter that has some of its projections several times."""

    def __init__(
        self, path: str, layer: nn.Module, name: str, tensors: Mapping[str, Tensor], **how: Any
    ) -> None:
        super().__init__(path, layer, name, tensors, **how)
        self.bottleneck = tensors["adamix_down_bias"].shape[-1]

    def projections(self) -> list[Tensor]:
        """Those of the experts that are drawn, in training; else of their mean."""
        found: list[Tensor] = []
        for weight, bias in zip(self.trained()[::2], self.trained()[1::2], strict=True):
            if weight.dim() == 2:
                found += [weight, bias]
            elif self.layer.training:
                i = int(torch.randint(len(weight), (), device="cpu"))
                found += [weight[i], bias[i]]
            else:
                found += [weight.mean(0), bias.mean(0)]
        return found

    @torch.no_grad()
    def average(self) -> None:
        """Keep the means as the only experts."""
        for key in self.added_keys:
            value = self.layer.get_parameter(key)
            if value.dim() > 1 + key.partition("@")[0].endswith(("down", "up")):
                self.layer.register_parameter(key, nn.Parameter(value.mean(0, keepdim=True)))
