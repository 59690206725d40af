"""Proxy-tuning: steer a model by what tuning has changed in a small one, on the logits, while it writes.

    s = s_M + α · (s_M⁺ − s_M⁻)          p ∝ p_M · (p_M⁺ / p_M⁻)^α

M is the model as it is; M⁺ is a small model that was tuned, M⁻ the same one before. Nothing in M changes, so it may be
too large to train, or show no more than its logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.method import DEFAULT, attached, attaching
from pefttutor.parts.beside import caches_beside, carry, check_call, places, run_beside, vocabulary
from pefttutor.parts.settings import check_number
from pefttutor.parts.streams import Hooked, cache_made, named_arguments, seen_before

__all__ = ["Processor", "ProxyTuning"]


@dataclass(frozen=True, kw_only=True)
class ProxyTuning:
    """Add to a model's logits what tuning has changed in those of a smaller one.

    s = s_M + α · (s_M⁺ − s_M⁻)

    >>> from pefttutor.models import load
    >>> model, expert, anti_expert = (load("campus-nano")[0] for _ in range(3))
    >>> tokens = torch.tensor([[5, 6, 7]])
    >>> before = model(tokens).logits
    >>> model = ProxyTuning(alpha=1.0).attach(model, expert, anti_expert)
    >>> torch.equal(model(tokens).logits, before)                       # the expert has learned nothing yet
    True

    alpha: the strength α; 0 is the model as it is.

    Attached, the model's forward and its `generate` say the sum, with caches of their own for the two others, for
    beams, and with padding on either side. `processor` is the same for a model that nothing may be attached to.
    Temperature and top-p act on the sum. The two others stand beside the model: they aren't moved with it, are run
    where they are, and train nothing here; so nothing is saved either. All three must have one tokenizer, which their
    sizes alone can't prove.

    Shapes: (batch, seq, vocabulary), the same for all three.
    Cost: a forward pass of M⁺ and one of M⁻ for each of M, and their caches; no trained values (`count`).
    Raises: ValueError for a model that isn't a causal language model, or one of another vocabulary.
    Source: Liu et al. 2024, arXiv:2401.08565, eq. 1 and 2.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_number(self, "alpha")

    def attach(
        self,
        model: nn.Module,
        expert: nn.Module | None = None,
        anti_expert: nn.Module | None = None,
        *,
        name: str = DEFAULT,
    ) -> nn.Module:
        """Freeze `model`, let it say the steered logits from now on, and return it. M⁻ may be `model` itself.

        Raises: ValueError if the name is in use or the three don't fit. The model is then as it was.
        """
        _check(expert, anti_expert, model)
        there = [part for a in attached(model).values() for part in a.parts if isinstance(part, _Steered)]
        steering = [other for part in there for other in part.steer.others] + [expert, anti_expert]
        if there and any(other is model for other in steering):
            raise ValueError(
                "one of two ProxyTunings on this model has the model itself for M⁻ or M⁺, which would speak as already "
                "steered by the other: give it a copy from before attaching, copy.deepcopy(model)."
            )
        with attaching(model, self, name) as new:
            steer = _Steer(self.alpha, name, (expert, anti_expert))
            new.add(_Steered([(model, steer.note)], after=[(model, steer.add)]))
        return model

    def processor(
        self, expert: nn.Module, anti_expert: nn.Module, *, attention_mask: Tensor | None = None
    ) -> Processor:
        """The same as a processor: `model.generate(…, logits_processor=[method.processor(expert, anti_expert)])`.

        It gives log-probabilities, as beams need them: of the tokens that no processor before it has forbidden. Make a
        new one for each call of `generate`.

        attention_mask: the prompts', where some are padded on the left. Shapes: (batch, seq).
        Raises: ValueError if the two don't fit.
        """
        _check(expert, anti_expert)
        return Processor(self.alpha, (expert, anti_expert), attention_mask)

    def count(self, model: nn.Module) -> int:
        """No values train."""
        return 0


def _check(expert: Any, anti_expert: Any, *models: nn.Module) -> None:
    sizes = [vocabulary(model) for model in models]
    if expert is None or anti_expert is None:
        raise ValueError("ProxyTuning needs two more models: attach(model, expert, anti_expert).")
    sizes += [vocabulary(model) for model in (expert, anti_expert)]
    if len(set(sizes)) > 1:
        roles = ("the model", "the expert", "the anti-expert")[-len(sizes) :]
        found = ", ".join(f"{role} has {size:,} tokens" for role, size in zip(roles, sizes, strict=True))
        raise ValueError(
            f"ProxyTuning adds logits token by token, so all must have one vocabulary; {found}. Take models of one "
            "family, with one tokenizer."
        )


def _combined(own: Tensor, alpha: float, expert: Tensor, anti: Tensor) -> Tensor:
    """s_M + α · (s_M⁺ − s_M⁻), at least in float32, for the last positions that all of them have."""
    wide = torch.promote_types(own.dtype, torch.float32)
    plus, minus = (s.to(own.device, wide)[..., -own.shape[-2] :, :] for s in (expert, anti))
    return (own.to(wide) + alpha * (plus - minus)).to(own.dtype)


class _Steered(Hooked):
    """The hooks, which take effect although nothing trains."""

    acts_alone = True

    @property
    def steer(self) -> _Steer:
        return self.hooks[0][1].__self__  # type: ignore[attr-defined]

    def kept_aside(self) -> list[Tensor]:
        return [t for other in self.steer.others for t in (*other.parameters(), *other.buffers())]

    def check_foldable(self) -> None:
        raise ValueError("it adds other models' logits, which no weight can hold; leave it attached.")


@dataclass(eq=False)
class _Steer:
    """Two hooks of the steered model: what it is called with, and what it has said."""

    alpha: float
    key: str
    others: tuple[Any, ...]
    call: dict[str, Any] = field(default_factory=dict, repr=False)
    caches: tuple[Any, ...] = (None, None)  # the others', after what came before this call

    def note(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.call = named_arguments(model, args, kwargs)
        check_call(self.call)
        mask = self.call.get("attention_mask")
        if mask is not None and "position_ids" not in inspect.signature(model.forward).parameters:
            self.call["position_ids"] = places(mask, self.call["input_ids"])  # the others may need to know
        cache, filled = seen_before(self.call)
        caches = caches_beside(cache, self.key) if filled is not False else None
        if caches is None and filled:
            raise ValueError(
                "ProxyTuning goes on from the caches of all three models, and this cache was filled without it: "
                "compute the text's beginning with the steered model too."
            )
        self.caches = caches or (None, None)

    def add(self, model: Any, args: Any, output: Any) -> Any:
        """Put the steered logits, and a loss of these, into what the model gives."""
        call, caches = self.call, self.caches
        self.call, self.caches = {}, (None, None)
        own = getattr(output, "logits", None)
        if own is None:
            raise ValueError(
                "ProxyTuning adds to output.logits, and this call gives none: leave return_dict out."
            )
        said, filled = [], []
        for other, cache in zip(self.others, caches, strict=True):
            logits, after = (own, None) if other is model else run_beside(other, call, cache)
            said.append(logits)
            filled.append(after)
        carry(cache_made(output), self.key, filled)
        output.logits = _combined(own, self.alpha, *said)
        if call.get("labels") is not None:
            output.loss = _loss(model, output, own, call)
        return output


def _loss(model: Any, output: Any, own: Tensor, call: Mapping[str, Any]) -> Tensor:
    """The model's loss of the steered logits. Raises: ValueError if it isn't one of its logits and labels alone."""
    sizes = {"labels": call["labels"], "vocab_size": own.shape[-1]}
    if call.get("num_items_in_batch") is not None:  # over how many tokens a Trainer that accumulates divides
        sizes["num_items_in_batch"] = call["num_items_in_batch"]
    if not torch.allclose(model.loss_function(logits=own, **sizes), output.loss, rtol=1e-3, equal_nan=True):
        raise ValueError(
            f"the loss of a {type(model).__name__} isn't one of its logits and labels alone, so it isn't known for the "
            "steered logits: leave labels out, and make the loss of output.logits."
        )
    return model.loss_function(logits=output.logits, **sizes)


@dataclass(eq=False)
class Processor:
    """A processor of scores for `generate`: log softmax(scores + α · (s_M⁺ − s_M⁻)).

    It runs the two models on the texts that it gets, from its second call on only on their last token; a text that goes
    on from another row of before, as beams do, takes that row's caches.

    Shapes: input_ids (batch, seq), scores (batch, vocabulary) → (batch, vocabulary).
    """

    alpha: float
    others: tuple[Any, Any]
    attention_mask: Tensor | None = None
    before: Tensor | None = field(default=None, repr=False)  # the texts of the call before
    caches: list[Any] = field(default_factory=lambda: [None, None], repr=False)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = self._rows(input_ids)
        mask = self._mask(input_ids)
        new = input_ids if rows is None else input_ids[:, -1:]
        call = {"input_ids": new, "attention_mask": mask, "use_cache": True, "logits_to_keep": 1}
        call["position_ids"] = places(mask, new)
        said = []
        for i, (other, cache) in enumerate(zip(self.others, self.caches, strict=True)):
            if rows is None:
                cache = None
            elif not torch.equal(rows, torch.arange(len(rows), device=rows.device)):
                cache.reorder_cache(rows)
            logits, self.caches[i] = run_beside(other, call, cache)
            said.append(logits)
        self.before = input_ids
        return _combined(scores.unsqueeze(1), self.alpha, *said).squeeze(1).log_softmax(-1)

    def _rows(self, input_ids: Tensor) -> Tensor | None:
        """Which text of the call before each one goes on from by a token; None where they don't."""
        if self.before is None or self.before.shape != input_ids[:, 1:].shape or None in self.caches:
            return None
        same = (input_ids[:, None, :-1] == self.before).all(-1)  # (batch, batch of before)
        if not same.any(1).all():
            return None
        here = torch.arange(len(same), device=same.device)
        return torch.where(same.diagonal(), here, same.int().argmax(1))

    def _mask(self, input_ids: Tensor) -> Tensor:
        """1 for real tokens, 0 for padding: as given, else for the padding tokens that a text begins with."""
        given = self.attention_mask
        if given is None:
            pad = getattr(self.others[0].config, "pad_token_id", None)
            real = input_ids != (-1 if pad is None else pad)
            return (real.cumsum(1) > 0).long()
        longer = input_ids.shape[1] - given.shape[1]  # by how many tokens the texts are
        if len(input_ids) % len(given) or longer < 0 or (self.before is None and longer):
            raise ValueError(
                f"attention_mask is {tuple(given.shape)} and the texts are {tuple(input_ids.shape)}: give the prompts' "
                "own mask, and make a new processor for each call of generate."
            )
        given = given.to(input_ids.device).long().repeat_interleave(len(input_ids) // len(given), 0)
        return nn.functional.pad(given, (0, longer), value=1)
