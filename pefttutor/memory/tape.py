"""What autograd saves for the backward pass, written down operation by operation, on paper.

A `Paper` is a tensor without values: how many numbers, how wide, whether a gradient flows into it. The operations
below are those of a transformer; each notes what autograd keeps for its own backward pass, which depends on who
needs a gradient:

    y = x Wᵀ        keeps x where W trains, and nothing where W is frozen
    y = a · b       keeps a where b needs a gradient, and b where a does
    y = softmax(x)  keeps y

A storage is counted once, however many operations keep it, and parameters aren't counted: they exist anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from pefttutor.memory.layers import Bare, plain_rule, run_alone, trains
from pefttutor.memory.paper import FLOAT, INDEX, KINDS, Paper

__all__ = ["Tape"]


@dataclass
class Tape:
    """Notes of one forward pass: which storage is kept, under which kind.

    >>> tape, x = Tape(), Paper(rows=6, width=4, itemsize=4, grad=False)
    >>> y = tape.linear(x, 8, "ffn", weight=True)           # W trains, so x is kept
    >>> tape.bytes_by_kind()["ffn"], y.grad
    (96, True)

    parts: those of what is attached; each is asked for `trace` where it has changed a layer. device: "cpu" or "cuda",
    which differ in what dropout and fused attention keep. lean: whether the loss is `losses.causal_lm_loss`.
    """

    parts: Sequence[Any] = ()
    device: str = "cuda"
    lean: bool = False
    kept: dict[Paper, str] = field(default_factory=dict)
    peaks: list[dict[Paper, str]] = field(default_factory=list)  # what one recomputed layer adds, for each
    met: set[Any] = field(default_factory=set)  # parameters of the layers that were called
    alone: dict[Any, tuple[Paper, list[Paper], Paper]] = field(default_factory=dict)  # see `run_alone`

    def save(self, paper: Paper, kind: str) -> None:
        if not (self.lean and paper.again):
            self.kept.setdefault(paper.storage, kind)

    # ---- layers

    def call(self, layer: Any, x: Paper, kind: str) -> Paper:
        """One layer of a model, by the rule of its type; a layer that a method has changed, by the method's rule."""
        self.met.update(layer.parameters())
        x, rule = self.into(layer, x, kind), plain_rule(layer)
        if rule is not None:
            return rule(self, layer, x, kind)
        return self._traced(layer, x, kind) or run_alone(self, layer, x, kind)

    def into(self, layer: Any, x: Paper, kind: str) -> Paper:
        """What goes into a layer where x would, after what is attached has changed it."""
        for part in self.parts:
            x = part.trace_into(layer, x, self, kind)
        return x

    def _traced(self, layer: Any, x: Paper, kind: str) -> Paper | None:
        """The output by the rule of the one part that has changed the layer. Raises: ValueError if several have, or
        others stand in the place of its weight."""
        changed = [part for part in self.parts if part.covers(layer)]
        several = len(changed) + any(part.shades(layer) for part in self.parts)
        if changed and several > 1:
            raise ValueError(
                f"{several} attachments change the same {type(layer).__name__}, and the estimator knows what one "
                "keeps. Measure it instead: pefttutor.memory.measure(step, model=model)."
            )
        return changed[0].trace(layer, x, self, kind) if changed else None

    def trains(self, *parameters: Any) -> bool:
        """Whether one of these parameters trains."""
        self.met.update(parameters)
        return any(trains(parameter) for parameter in parameters)

    def own(self, module: nn.Module, kind: str) -> bool:
        """Whether one of a module's bare parameters trains; keeps what a method makes of them instead."""
        if "_shadows" in vars(module):
            run_alone(self, Bare(module), Paper(1, 1, FLOAT, False), kind)
        return self.trains(*module._parameters.values())

    def linear(self, x: Paper, out: int, kind: str, *, weight: bool, bias: bool = False) -> Paper:
        """y = x Wᵀ + b; `weight` and `bias` say whether they train. Keeps x, as a view, where W does."""
        if weight:
            self.save(x.view(), kind)
        return x.like(width=out, grad=x.grad or weight or bias)

    # ---- element by element

    def mul(self, a: Paper, b: Paper, kind: str) -> Paper:
        """y = a · b, the shape of a."""
        if b.grad:
            self.save(a, kind)
        if a.grad:
            self.save(b, kind)
        again = (a.grad and b.grad) or (a.grad and a.again) or (b.grad and b.again)
        return a.like(b, again=again, itemsize=max(a.itemsize, b.itemsize))

    def activation(self, name: str, x: Paper, kind: str) -> Paper:
        """An activation function by the name that the config gives it."""
        if name in ("relu", "tanh"):
            y = x.like()
            if x.grad:
                self.save(y, kind)
            return y
        if name in ("silu", "swish", "gelu", "gelu_pytorch_tanh", "bloom_gelu"):
            if x.grad:
                self.save(x, kind)
            return x.like(again=name != "bloom_gelu")
        if name == "gelu_new":  # ½x · (1 + tanh(…(x + …x³))), written out
            if x.grad:
                for tensor in (x, x.like(), x.like(), x.like()):  # x for x³, tanh, ½x, 1 + tanh
                    self.save(tensor, kind)
            return x.like(again=True)
        known = "silu, gelu, gelu_new, gelu_pytorch_tanh, relu, tanh"
        raise ValueError(f"activation {name!r} is not known to the estimator; it knows {known}")

    def dropout(self, x: Paper, p: float) -> Paper:
        """Keeps the mask: one byte a value on a GPU, a number as wide as x on a CPU."""
        if not p:
            return x
        if x.grad:
            self.save(x.like(itemsize=x.itemsize if self.device == "cpu" else 1), "dropout")
        return x.like(again=x.again if self.device == "cpu" else False)

    def cast(self, x: Paper, itemsize: int) -> Paper:
        return x if x.itemsize == itemsize else x.like(itemsize=itemsize)

    # ---- the loss

    def cross_entropy(self, logits: Paper) -> None:
        """Keeps the log-softmax, and the labels."""
        if logits.grad:
            self.save(logits.like(), "logits and loss")
            self.save(logits.like(width=1, itemsize=INDEX), "logits and loss")
            self.save(logits.like(rows=1, width=1, itemsize=FLOAT), "logits and loss")

    # ---- checkpointing

    def block(self, forward: Callable[..., Paper], layer: nn.Module, x: Paper, **more: Any) -> Paper:
        """One transformer layer; under checkpointing only its input is kept, and the rest made again for its turn.

        A method that has changed a layer itself changes its input: `trace` says how.
        """
        if changed := self._traced(layer, x, "layer inputs"):
            self.met.update(layer._parameters.values())
            x = changed
        if not getattr(layer, "gradient_checkpointing", False):
            return forward(self, layer, x, **more)
        inner = replace(self, kept={}, peaks=[])
        y = forward(inner, layer, x, **more)
        self.save(x, "layer inputs")
        for paper in more.values():
            if isinstance(paper, Paper):
                self.save(paper, "layer inputs")
        self.peaks.append(
            self.kept | {paper: kind for paper, kind in inner.kept.items() if paper not in self.kept}
        )
        return y.like(grad=y.grad or x.grad)

    def bytes_by_kind(self) -> dict[str, int]:
        """What is kept at the fullest moment: at the end of the forward pass, or while a layer is made again."""
        moments = [_sum(moment) for moment in (self.kept, *self.peaks)]
        return max(moments, key=lambda moment: sum(moment.values()))


def _sum(kept: dict[Paper, str]) -> dict[str, int]:
    sums = dict.fromkeys(KINDS, 0)
    for paper, kind in kept.items():
        sums[kind] += paper.numel * paper.itemsize
    return sums
