"""Fisher information of a model's parameters on some examples: how much each entry matters for what the model says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pefttutor.data.batches import Collate, collator
from pefttutor.data.checks import check_counts
from pefttutor.data.evaluation import evaluating
from pefttutor.data.targets import aligned, count_targets, predicts_next
from pefttutor.kernels.fisher import add_squared_gradients, check_finite, no_squares

__all__ = ["example_losses", "fisher_information", "total_gradient"]

LogLikelihood = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


@torch.inference_mode(False)  # there would be no gradient
def fisher_information(
    model: nn.Module,
    examples: Sequence[Any],
    *,
    expected: bool = False,
    samples: int | None = None,
    batch_size: int = 8,
    max_bytes: int = 1 << 26,
    collate: Collate | None = None,
    log_likelihood: LogLikelihood | None = None,
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of every parameter, trained or not; the model is left as it was.

    F_i = (1/|D|) Σ_s (∂ log p(y_s | x_s) / ∂θ_i)²                          empirical, y_s the example's label
    F_i = (1/|D|) Σ_s Σ_y p(y | x_s) (∂ log p(y | x_s) / ∂θ_i)²             expected=True: no label is used

    Every example's gradient is squared on its own, in evaluation mode (no dropout). For a language model
    log p(y | x) is the sum over the labelled tokens. Parameters of integers (quantized ones) have none.

    samples: the first so many examples; None takes all.
    max_bytes: of the gradient that exists beside the result (see `squared_gradients`).
    log_likelihood(model, batch) → one value an example, for a model that doesn't take `labels` as transformers' do.

    Shapes: by name, those of the parameters.
    Cost: about one training step a batch (C times the backward for C classes if expected).
    Raises: ValueError for samples or batch_size below 1, without examples or labels, for labels that aren't classes
        or tokens; FloatingPointError if a loss or gradient isn't finite.
    Source: chapter eq. 4.8 and 4.9; Sung et al. 2021, arXiv:2111.09839, eq. 3 and 4.
    """
    for name, given in (("samples", samples), ("batch_size", batch_size)):
        if given is not None and given < 1:
            raise ValueError(f"fisher_information: {name} is {given}, expected at least 1")
    chosen = [examples[i] for i in range(min(len(examples), samples or len(examples)))]
    if not chosen:
        raise ValueError("fisher_information needs at least one example, and there is none.")
    if log_likelihood is None and not expected and any("labels" not in example for example in chosen):
        raise ValueError(
            "the empirical Fisher information needs labels, and an example has only "
            f"{', '.join(chosen[0])}: add labels, or ask for expected=True, or give log_likelihood=, a function "
            "(model, batch) → one value an example."
        )
    stack, device = collate or collator(model), next(model.parameters()).device
    value = log_likelihood or (_expected if expected else _empirical)
    first = min(2, batch_size)  # with two, proving what a layer's rows are costs least
    starts = [0, *range(first, len(chosen), batch_size)]
    trusted: set[nn.Module] = set()
    with evaluating(model), _all_trained(model):
        with torch.no_grad():  # a first run changes the weights of some models: Switch's router casts its own
            value(model, {k: v.to(device) for k, v in stack(chosen[:first]).items()})
        total = no_squares(model)
        for start, end in pairwise([*starts, len(chosen)]):
            batch = {k: v.to(device) for k, v in stack(chosen[start:end]).items()}
            trusted = add_squared_gradients(
                model,
                partial(value, model, batch),
                total,
                samples=len(next(iter(batch.values()))),
                max_bytes=max_bytes,
                trusted=trusted,
            )
    check_finite(total)
    return {name: value.div_(len(chosen)) for name, value in total.items()}


@torch.inference_mode(mode=False)  # gradients are needed here, whatever the caller has switched off
@torch.enable_grad()
def total_gradient(
    model: nn.Module,
    examples: Sequence[Any],
    *,
    batch_size: int = 16,
    collate: Collate | None = None,
    log_likelihood: LogLikelihood | None = None,
) -> dict[str, Tensor]:
    """The gradient of the mean loss over all examples' labels, signed, in evaluation mode; changes nothing.

    With log_likelihood, as in `fisher_information`, that of −log p(y | x), averaged over the examples.
    """
    check_counts(batch_size=batch_size)
    stack, device = collate or collator(model), next(model.parameters()).device
    before = [(p, p.grad) for p in model.parameters()]
    counted = 0
    try:
        model.zero_grad()
        with evaluating(model), _all_trained(model):
            for start in range(0, len(examples), batch_size):
                rows = [examples[i] for i in range(start, min(start + batch_size, len(examples)))]
                batch = {k: v.to(device) for k, v in stack(rows).items()}
                if log_likelihood is not None:
                    count = len(rows)
                    (-log_likelihood(model, batch).sum()).backward()
                elif count := count_targets(batch, shifted=predicts_next(model, batch)):
                    (model(**batch).loss * count).backward()  # without a label the mean would be NaN
                counted += count
        return {
            n: (torch.zeros_like(p) if p.grad is None else p.grad / counted)
            for n, p in model.named_parameters()
        }
    finally:
        for p, grad in before:
            p.grad = grad


def example_losses(
    model: nn.Module,
    examples: Sequence[Any],
    *,
    collate: Collate | None = None,
    log_likelihood: LogLikelihood | None = None,
) -> Tensor:
    """The loss of each example, in evaluation mode; −log p(y | x) with log_likelihood. Shapes: → (n)."""
    stack, device = collate or collator(model), next(model.parameters()).device
    found = []
    with evaluating(model), torch.no_grad():
        for example in examples:
            batch = {k: v.to(device) for k, v in stack([example]).items()}
            found.append(
                model(**batch).loss if log_likelihood is None else -log_likelihood(model, batch).squeeze()
            )
    return torch.stack(found).cpu()


@contextmanager
def _all_trained(model: nn.Module) -> Iterator[None]:
    """Within the block every parameter requires a gradient, except integers; then each as before."""
    before = {p: p.requires_grad for p in model.parameters() if p.is_floating_point()}
    try:
        for p in before:
            p.requires_grad_(True)
        yield
    finally:
        for p, requires_grad in before.items():
            p.requires_grad_(requires_grad)


def _logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The logits; an encoder–decoder makes its decoder's input of the labels, so it gets them too."""
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    reads_labels = (
        both and "decoder_input_ids" not in batch and batch.get("labels", torch.zeros(())).dim() == 2
    )
    output = model(**{key: value for key, value in batch.items() if key != "labels" or reads_labels})
    if getattr(output, "logits", None) is None:
        raise ValueError(
            f"{type(model).__name__} gives {', '.join(output) if isinstance(output, dict) else type(output).__name__} "
            "and no logits: give log_likelihood=, a function (model, batch) → one value an example."
        )
    return output.logits


def _empirical(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """log p(label | input) of each example. Shapes: → (B)."""
    labels = batch["labels"]
    if labels.is_floating_point():
        raise ValueError(
            f"labels are {labels.dtype} {tuple(labels.shape)}, expected classes or tokens as integers; for anything "
            "else give log_likelihood, for a regression −(prediction − label)² / 2 of each example"
        )
    logits = _logits(model, batch)
    if labels.dim() == 1:
        return -cross_entropy(logits, labels, reduction="none")
    logits, labels = aligned(logits, labels, shifted=predicts_next(model, dict(batch)))
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
