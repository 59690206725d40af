"""Attentions as Llama's: their queries, keys and values by their own layers, seen to be what the model computes.

    softmax(s · q kᵀ) v          q, k, v = W_q h, W_k h, W_v h;  q and k are normed and rotated, where the model does so

A rotation turns pairs of features by an angle that grows with the position, so that q · k tells how far apart two
tokens are. What a model does beside this, such as another rotation, isn't known here: whether it does is tried.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.data.trial import trial
from pefttutor.parts.attachment import attachments
from pefttutor.parts.bottleneck import width_of
from pefttutor.parts.linear import sizes, why_not_linear
from pefttutor.parts.streams import hidden_states, named_arguments
from pefttutor.parts.sublayers import trial_inputs
from pefttutor.parts.switching import without

__all__ = ["Call", "Heads", "attentions"]

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
LOUD = 1000.0  # times what W_v gives in the trial: a bound on it, such as OLMo's clip_qkv, is reached then


@dataclass(frozen=True)
class Heads:
    """How an attention divides what its layers give: so many heads of queries, of keys and values, of this width.

    scaling: of the products of queries and keys. cap: what their absolute values are kept below, as Gemma 2 does it.
    """

    queries: int
    keys: int
    width: int
    scaling: float
    cap: float | None

    @classmethod
    def of(cls, attention: Any) -> Heads:
        width = int(attention.head_dim)
        out = {name: sizes(getattr(attention, name))[1] // width for name in LAYERS[:2]}
        scaling, cap = (getattr(attention, key, None) for key in ("scaling", "attn_logit_softcapping"))
        return cls(out["q_proj"], out["k_proj"], width, width**-0.5 if scaling is None else scaling, cap)

    def scores(self, products: Tensor) -> Tensor:
        """What goes into the softmax, of the products of queries and keys."""
        scores = self.scaling * products
        return scores if self.cap is None else self.cap * torch.tanh(scores / self.cap)


@dataclass(eq=False)
class Call:
    """What an attention is called with, for a layer in it that needs the queries: hooks before it and after q_proj.

    It isn't copied or pickled along: it belongs to one forward pass.
    """

    attention: Any = field(default=None, repr=False)
    rotation: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    q: Tensor | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"attention": None, "rotation": None, "q": None}

    def enter(self, attention: nn.Module, args: Any, kwargs: Any) -> None:
        self.attention, self.q = attention, None
        self.rotation = named_arguments(attention, args, kwargs).get("position_embeddings")

    def note(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        self.q = output

    def take(self) -> tuple[Any, Tensor]:
        """The attention, and its queries (batch, seq, heads, width), normed and rotated; once.

        Raises: RuntimeError if it wasn't called since.
        """
        attention, q, rotation = self.attention, self.q, self.rotation
        self.attention = self.q = self.rotation = None
        if q is None:
            raise RuntimeError(
                "o_proj was called without its attention, whose queries it needs: call the model."
            )
        return attention, _rotated(_in_heads(attention, q, "q"), rotation)


def keys_and_values(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows x by the attention's own layers, not rotated. Shapes: (…, d) → twice (…, heads, width)."""
    return _in_heads(attention, attention.k_proj(x), "k"), _in_heads(attention, attention.v_proj(x), "v")


def _in_heads(attention: Any, x: Tensor, which: str) -> Tensor:
    norm = getattr(attention, f"{which}_norm", None)
    if norm is not None:  # of each head, or over all
        x = norm(x.unflatten(-1, (-1, width_of(norm)))).flatten(-2)
    return x.unflatten(-1, (-1, int(attention.head_dim)))


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
    """x cos + (−x₂, x₁) sin, for the first features where there are fewer angles; x without a rotation.

    Shapes: x (batch, seq, heads, width), cos and sin (batch, seq, angles).
    """
    if rotation is None:
        return x
    cos, sin = (each.unsqueeze(-2) for each in rotation)
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turning.chunk(2, -1)
    turned = (turning * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)  # angles may be in float32
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


# ---- which attentions a model has


def attentions(model: nn.Module, who: str) -> dict[str, nn.Module]:
    """The attentions of this form that a text or a picture reaches, by name, in the order of the calls.

    Others are told from them by what they give, to 10⁻⁴, in half precision to 2 %.

    who: begins the refusal. Cost: a forward pass of three tokens, or of one picture.

    Raises: ValueError for a model that has none, that can't be tried, or one of which computes something else.
    """
    kind = type(model).__name__
    found = {n: m for n, m in model.named_modules() if all(_is_linear(m, layer) for layer in LAYERS)}
    if not found:
        raise ValueError(
            f"{who} attentions that have the linear layers {', '.join(LAYERS)}, as Llama's, and in a {kind} there is "
            "none. PrefixTuning puts keys and values before those of other attentions."
        )
    for name, attention in found.items():
        more = [
            key for key, _ in attention.named_parameters() if key.partition(".")[0] not in (*LAYERS, *NORMS)
        ]
        if more:  # such as a bias for each distance, which may happen to be zero now
            raise ValueError(_another_form(who, name, kind, f"it has a parameter {more[0]!r}"))
    if any(p.is_meta for p in model.parameters()):
        return found  # without values it can't be seen what they compute
    try:
        seen = _tried(model, found)
    except Exception as error:  # whatever a model raises here means: it can't be tried in this way
        raise ValueError(
            f"{who} attentions whose form is seen in a trial, and a {kind} can't be tried "
            f"({type(error).__name__}: {error})."
        ) from error
    for name, (ours, theirs) in seen.items():
        near = 2e-2 if theirs.dtype.itemsize < 4 else 1e-4
        if ours is None or not float((ours - theirs).norm()) <= near * float(theirs.norm()):
            raise ValueError(_another_form(who, name, kind, "another rotation?"))
    return {name: found[name] for name in seen}


def _another_form(who: str, name: str, kind: str, what: str) -> str:
    return (
        f"{who} attentions that compute softmax(s · q kᵀ) v as Llama's, and {name!r} of this {kind} computes something "
        f"else ({what}). PrefixTuning puts keys and values before those of other attentions."
    )


def _is_linear(module: nn.Module, name: str) -> bool:
    layer = getattr(module, name, None)
    return isinstance(layer, nn.Module) and why_not_linear(layer) is None


def _tried(model: nn.Module, found: dict[str, nn.Module]) -> dict[str, tuple[Tensor | None, Tensor]]:
    """For each that is called what its o_proj should get by the formula, None if that fails, and what it gets.

    Without prefixes, whose keys and values the attention doesn't make itself.
    """
    carried = attachments(model)
    there = carried.by_name.values() if carried else ()
    prefixes = [a for a in there if any(part.precedes() for part in a.parts)]
    seen: dict[str, tuple[Tensor | None, Tensor]] = {}
    handles = []
    for name, attention in found.items():
        call, read = Call(), []  # type: ignore[var-annotated]

        def enter(attention: Any, args: Any, kwargs: Any, call: Call = call, read: list = read) -> None:
            call.enter(attention, args, kwargs)
            read[:] = [hidden_states(args, kwargs)]

        def leave(layer: Any, args: Any, name: str = name, call: Call = call, read: list = read) -> Any:
            rotation = call.rotation
            try:
                ours = _formula(*call.take(), read[0], rotation)
            except Exception:  # it has another form
                ours = None
            seen[name] = ours, args[0]
            return args[0] / LOUD, *args[1:]  # as loud as ever, for what comes after

        handles += [
            attention.register_forward_pre_hook(enter, with_kwargs=True),
            attention.q_proj.register_forward_hook(call.note),  # type: ignore[union-attr, operator]
            attention.v_proj.register_forward_hook(lambda layer, args, v: LOUD * v),  # type: ignore[union-attr, operator]
            attention.o_proj.register_forward_pre_hook(leave),  # type: ignore[union-attr, operator]
        ]
    try:
        with trial(model), without(model, prefixes):
            model(**trial_inputs(model))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _formula(attention: Any, q: Tensor, h: Tensor, rotation: Any) -> Tensor:
    """What the attention gives o_proj for hidden states h (batch, seq, d), each head written out."""
    heads, wide = Heads.of(attention), torch.promote_types(q.dtype, torch.float32)
    k, v = keys_and_values(attention, h)
    k, v = (x.repeat_interleave(heads.queries // heads.keys, 2).to(wide) for x in (_rotated(k, rotation), v))
    scores = heads.scores(torch.einsum("bqhd,bkhd->bhqk", q.to(wide), k))
    if getattr(attention, "is_causal", True):
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
