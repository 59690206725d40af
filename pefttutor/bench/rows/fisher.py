"""The diagonal Fisher information of every parameter of a BERT-like model, against batches of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pefttutor.bench.row import Row, Side, Step
from pefttutor.parts.information import fisher_information

BATCH, BATCHES, SEQUENCE = 16, 4, 32


def build(side: Side, seed: int, device: str) -> Step:
    """The same model and examples for every side; the bound is an ordinary gradient of each batch."""
    model = _model(seed).to(device)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, model.config.vocab_size, (BATCHES * BATCH, SEQUENCE), generator=generator)
    labels = torch.randint(0, model.config.num_labels, (BATCHES * BATCH,), generator=generator)
    tokens, labels = tokens.to(device), labels.to(device)
    if side == "ours":
        examples = [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]
        collate = torch.utils.data.default_collate
        return lambda: _compared(fisher_information(model, examples, batch_size=BATCH, collate=collate))
    if side == "peer":
        return lambda: _compared(_squares(model, tokens.split(1), labels.split(1)))
    return lambda: _compared(_squares(model, tokens.split(BATCH), labels.split(BATCH)))


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


def _squares(model: Any, tokens: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
    """Mean of the squared gradients of log p(labels): of batches of one, what the published codes of FISH do."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for t, y in zip(tokens, labels, strict=True):
        model.zero_grad()
        cross_entropy(model(input_ids=t).logits, y, reduction="sum").backward()
        for name, p in model.named_parameters():
            total[name].addcmul_(p.grad, p.grad)
    return {name: value / (BATCHES * BATCH) for name, value in total.items()}


ROWS = [
    Row(
        name="fisher",
        work=f"Fisher information, all parameters, BERT-like 4 M, {BATCHES * BATCH} samples of {SEQUENCE} tokens",
        peer="batches of one",
        build=build,
        goals={"time": 0.22},
        cuda_goals={"time": 0.20},
        bound=f"an ordinary gradient of each batch of {BATCH}",
        tolerance=1e-3,
        rounds=7,
    )
]
