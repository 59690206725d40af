"""From the last hidden state to the loss, on a `Tape`: language models, classifiers of texts and pictures."""

from __future__ import annotations

from typing import Any

from pefttutor.memory.layers import trains
from pefttutor.memory.paper import FLOAT, Paper
from pefttutor.memory.step import Step
from pefttutor.memory.tape import Tape

__all__ = ["head", "knows"]

KIND = "logits and loss"


def knows(model: Any) -> bool:
    """Whether `head` has a rule for this model's output.

    >>> from torch import nn
    >>> knows(nn.ModuleDict({"score": nn.Linear(8, 2)})), knows(nn.ModuleDict({"body": nn.Linear(8, 8)}))
    (True, False)
    """
    masked = hasattr(model, "cls") and [*model.cls._modules] == ["predictions"]
    return masked or any(hasattr(model, name) for name in ("lm_head", "score", "classifier"))


def head(tape: Tape, model: Any, hidden: Paper, step: Step) -> Paper:
    """The logits; what they and the loss keep is then on the tape.

    >>> from torch import nn
    >>> model = nn.Module()
    >>> model.score = nn.Linear(8, 2)                                       # one answer for each text of 3 tokens
    >>> head(Tape(), model, Paper(rows=6, width=8, itemsize=4, grad=True), Step(2, 3, 3, "sdpa")).rows
    2

    Shapes: hidden (batch · sequence, d) → (batch · sequence, vocabulary), or (batch, classes) of a classifier.
    Raises: ValueError for a model without a head that the estimator knows.
    """
    if not knows(model):
        name = type(model).__name__
        raise ValueError(
            f"{name} has no head that the estimator knows; give a model with lm_head, score, classifier or a masked "
            "language model's cls, or measure(step, model=model)"
        )
    if hasattr(model, "lm_head"):
        if tape.lean:
            return _lean(tape, model.lm_head, hidden)
        logits = tape.call(model.lm_head, hidden, KIND)
        if not model.config.is_encoder_decoder:  # T5 takes its loss in the logits' own dtype
            logits = tape.cast(logits, FLOAT)
    elif hasattr(model, "cls"):
        logits = _masked_words(tape, model, hidden)
    else:
        logits = _classified(tape, model, hidden, step)
    tape.cross_entropy(logits)
    return logits


def _masked_words(tape: Tape, model: Any, hidden: Paper) -> Paper:
    part = model.cls.predictions
    h = tape.call(part.transform.dense, hidden, KIND)
    h = tape.activation(model.config.hidden_act, h, KIND)
    return tape.call(part.decoder, tape.call(part.transform.LayerNorm, h, KIND), KIND)


def _classified(tape: Tape, model: Any, hidden: Paper, step: Step) -> Paper:
    """One answer for each text or picture."""
    if hasattr(model, "score"):  # a decoder: every token gets logits, the last one's count
        return tape.call(model.score, hidden, KIND).view(rows=step.batch_size).like()
    first = hidden.view(rows=step.batch_size)
    pooler = getattr(model.base_model, "pooler", None)
    if pooler is not None:
        first = tape.activation("tanh", tape.call(pooler.dense, first, KIND), KIND)
        first = tape.dropout(first, model.dropout.p)
    return tape.call(model.classifier, first, KIND)


def _lean(tape: Tape, layer: Any, hidden: Paper) -> Paper:
    """`kernels.cross_entropy` keeps a gradient as large as the hidden state, and the head's where it trains."""
    tape.met.update(layer.parameters())
    hidden = tape.into(layer, hidden, KIND)
    if hidden.grad:
        tape.save(hidden.like(), KIND)
    if trains(layer.weight):
        rows, width = layer.weight.shape
        tape.save(Paper(rows, width, max(4, layer.weight.element_size()), False), KIND)
    return Paper(0, 0, 4, hidden.grad)
