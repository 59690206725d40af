"""Squared per-sample gradients of every parameter of a BERT-like model, against batches of one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pefttutor.bench.row import Row, Side, Step
from pefttutor.kernels.fisher import squared_gradients

BATCH, SEQUENCE = 16, 64


def build(side: Side, seed: int) -> Step:
    """The same model and batch for every side; the bound is one ordinary gradient of the whole batch."""
    model = _model(seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, model.config.vocab_size, (BATCH, SEQUENCE), generator=generator)
    labels = torch.randint(0, model.config.num_labels, (BATCH,), generator=generator)
    if side == "ours":
        forward = partial(_log_likelihood, model, tokens, labels)
        return lambda: _compared(squared_gradients(model, forward, samples=BATCH))
    if side == "peer":
        return lambda: _compared(_batches_of_one(model, tokens, labels))
    return lambda: _gradient(model, tokens, labels)


def _compared(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """All but the biases of the keys: their gradient is 0, and what is left is rounding."""
    return {name: value for name, value in found.items() if not name.endswith("key.bias")}


def _model(seed: int) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=3000,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def _log_likelihood(model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    return -cross_entropy(model(input_ids=tokens).logits, labels, reduction="none")


def _gradient(model: Any, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    _log_likelihood(model, tokens, labels).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def _batches_of_one(model: Any, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What the published codes of FISH and Fish-Dip do."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for s in range(len(tokens)):
        for name, grad in _gradient(model, tokens[s : s + 1], labels[s : s + 1]).items():
            total[name].addcmul_(grad, grad)
    return total


ROWS = [
    Row(
        name="fisher",
        work=f"squared per-sample gradients, all parameters, BERT-like 4 M, {BATCH} × {SEQUENCE} tokens",
        peer="batches of one",
        build=build,
        goals={"time": 0.22},
        bound="one gradient of the whole batch",
        tolerance=1e-3,
        rounds=7,
    )
]
