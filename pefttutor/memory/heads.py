"""From the last hidden state to the loss, on a `Tape`: language model, classifier of texts or pictures."""

from __future__ import annotations

from typing import Any

from pefttutor.memory.layers import trains
from pefttutor.memory.paper import Paper
from pefttutor.memory.step import Step
from pefttutor.memory.tape import Tape

__all__ = ["head"]

KIND = "logits and loss"


def head(tape: Tape, model: Any, hidden: Paper, step: Step) -> Paper:
    """The logits; what they and the loss keep is on the tape."""
    if hasattr(model, "lm_head"):
        if tape.lean:
            return _lean(tape, model.lm_head, hidden)
        logits = tape.call(model.lm_head, hidden, KIND)
    elif hasattr(model, "score"):  # a decoder that classifies: every token gets logits, the last one's count
        logits = tape.call(model.score, hidden, KIND).view(rows=step.batch_size)
        logits = logits.like()
    elif hasattr(model, "classifier"):
        first = hidden.view(rows=step.batch_size)
        pooler = getattr(model.base_model, "pooler", None)
        if pooler is not None:
            first = tape.activation("tanh", tape.call(pooler.dense, first, KIND), KIND)
            first = tape.dropout(first, model.dropout.p)
        logits = tape.call(model.classifier, first, KIND)
    else:
        name = type(model).__name__
        raise ValueError(
            f"{name} has no head to take a loss from; give a model with lm_head, score or classifier"
        )
    tape.cross_entropy(logits)
    return logits


def _lean(tape: Tape, layer: Any, hidden: Paper) -> Paper:
    """`kernels.cross_entropy` keeps a gradient as large as the hidden state, and the head's where it trains."""
    if hidden.grad:
        tape.save(hidden.like(), KIND)
    if trains(layer.weight):
        rows, width = layer.weight.shape
        tape.save(Paper(rows, width, layer.weight.element_size(), False), KIND)
    return Paper(0, 0, 4, hidden.grad)
