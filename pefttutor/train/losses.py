"""Losses that `fit(loss=…)` takes in place of the model's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pefttutor.kernels.cross_entropy import linear_cross_entropy
from pefttutor.kernels.recompute import recompute_activations

__all__ = ["causal_lm_loss"]

# What a model may do between its head and its loss; each would make the number below another one.
_CHANGES_LOGITS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "logits_soft_cap",
    "output_router_logits",
)


def causal_lm_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss of `model(**batch).loss`, without the logits: `fit(model, train, loss=causal_lm_loss)`.

    loss = mean over t of −log softmax(hₜ Wᵀ + b)[label(t + 1)], labels of −100 left out

    The result and the gradients are the model's own; memory is lower, because the logits of a
    large vocabulary are most of a small model's activations (`linear_cross_entropy`), and because cheap
    activations are made again rather than kept (`recompute_activations`).

    Shapes: batch["input_ids"] and batch["labels"] (batch, seq), and whatever else the model takes → ().
    Cost: as `linear_cross_entropy`, for the labelled tokens.
    Raises: ValueError for a batch without labels; TypeError for a model whose logits aren't those of one plain
        linear head on its last hidden state.
    """
    if "labels" not in batch:
        raise ValueError(f"causal_lm_loss: the batch has {sorted(batch)}, expected 'labels' among them")
    body, head = _body_and_head(model)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with recompute_activations():
        hidden = body(**inputs).last_hidden_state  # (batch, seq, d)
    labels = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]  # the token at t predicts t + 1
    return linear_cross_entropy(hidden.flatten(0, 1), head.weight, labels.flatten(), head.bias)


def _body_and_head(model: Any) -> tuple[Any, Any]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    body, config = getattr(model, "base_model", None), getattr(model, "config", None)
    plain = type(head) is nn.Linear and any(child is head for child in model.children()) and body is not model
    changes = [name for name in _CHANGES_LOGITS if getattr(config, name, None) not in (None, False, 1, 1.0)]
    if not plain or changes or getattr(config, "is_encoder_decoder", False):
        raise TypeError(
            f"causal_lm_loss: {type(model).__name__} has head {type(head).__name__} and settings {changes}; "
            "expected a decoder with one plain linear head on its last hidden state: leave `loss` out for it"
        )
    return body, head
