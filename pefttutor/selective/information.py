"""Fisher information of a model's parameters on some examples: how much each entry matters for what the model says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pefttutor.encoding import predicts_next
from pefttutor.evaluation import Collate, collator
from pefttutor.kernels.fisher import checked_squares

__all__ = ["fisher_information"]

LogLikelihood = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def fisher_information(
    model: nn.Module,
    examples: Sequence[Any],
    *,
    expected: bool = False,
    samples: int | None = None,
    batch_size: int = 8,
    collate: Collate | None = None,
    log_likelihood: LogLikelihood | None = None,
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of every parameter, trained or not; the model is left as it was.

    F_i = (1/|D|) Σ_s (∂ log p(y_s | x_s) / ∂θ_i)²                          empirical, y_s the example's label
    F_i = (1/|D|) Σ_s Σ_y p(y | x_s) (∂ log p(y | x_s) / ∂θ_i)²             expected=True: no label is used

    Every example's gradient is squared on its own, in evaluation mode (no dropout). For a language model
    log p(y | x) is the sum over the labelled tokens.

    samples: the first so many examples; None takes all.
    log_likelihood(model, batch) → one value an example, for a model that doesn't take `labels` as transformers' do.

    Shapes: by name, those of the parameters.
    Cost: about one training step a batch (C times the backward for C classes if expected).
    Raises: ValueError without examples or labels, or for expected=True where labels aren't classes;
        FloatingPointError if a loss or gradient isn't finite.
    Source: chapter eq. 4.8 and 4.9; Sung et al. 2021, arXiv:2111.09839, eq. 3 and 4.
    """
    chosen = [examples[i] for i in range(min(len(examples), samples or len(examples)))]
    if not chosen:
        raise ValueError("fisher_information needs at least one example, and there is none.")
    if log_likelihood is None and not expected and any("labels" not in example for example in chosen):
        raise ValueError(
            "the empirical Fisher information needs labels, and an example has only "
            f"{', '.join(chosen[0])}: add labels, or ask for expected=True."
        )
    stack, device = collate or collator(model), next(model.parameters()).device
    value = log_likelihood or (_expected if expected else _empirical)
    before = {p: p.requires_grad for p in model.parameters()}
    training = model.training
    total: dict[str, Tensor] = {}
    proven: set[tuple[torch.Size, ...]] = set()
    try:
        model.eval().requires_grad_(True)
        for start in range(0, len(chosen), batch_size):
            batch = {k: v.to(device) for k, v in stack(chosen[start : start + batch_size]).items()}
            count = len(next(iter(batch.values())))
            forward = partial(value, model, batch)
            shapes = tuple(v.shape for v in batch.values())
            parts, good = checked_squares(model, forward, samples=count, check=shapes not in proven)
            proven |= {shapes} if good else set()
            total = {name: total[name] + part if total else part for name, part in parts.items()}
    finally:
        model.train(training)
        for p, requires_grad in before.items():
            p.requires_grad_(requires_grad)
    return {name: value.div_(len(chosen)) for name, value in total.items()}


def _logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def _empirical(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """log p(label | input) of each example. Shapes: → (B)."""
    logits, labels = _logits(model, batch), batch["labels"]
    if labels.dim() == 1:
        return -cross_entropy(logits, labels, reduction="none")
    if predicts_next(model):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return -cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)  # −100 counts 0


def _expected(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """√p(y | x) · log p(y | x) for each class: its squared gradient is the class's share. Shapes: → (C, B)."""
    logits = _logits(model, batch)
    if logits.dim() != 2:
        raise ValueError(
            f"expected=True sums over all labels, and the logits are {tuple(logits.shape)}, a label for each token; "
            "expected (batch, classes). Use the empirical information, or sample labels from the model."
        )
    logp = logits.log_softmax(-1)
    return (logp.detach().exp().sqrt() * logp).t()
