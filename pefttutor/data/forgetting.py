"""`held_out_loss`: how well a model still reads the world that it was pretrained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from pefttutor.data.batches import collator
from pefttutor.data.encoding import encode
from pefttutor.data.evaluation import evaluate
from pefttutor.data.generation import speaks
from pefttutor.data.targets import IGNORED, aligned
from pefttutor.data.tasks import load
from pefttutor.data.trial import evaluating, fresh_casts

__all__ = ["held_out_loss"]

TEXT = "world_text"


@torch.no_grad()
def held_out_loss(model: Any, tokenizer: Any, *, batch_size: int = 25) -> float:
    """Mean loss in nats per token on text of the world that no model has read: as far as it rises, a model forgets.

        forgetting = held_out_loss(adapted) − held_out_loss(base)

    A classifier has no language head any more: where the base's was tied to the embeddings, these take its place, and
    what an InvertibleAdapter does is taken back before them.

    >>> from pefttutor.models import load
    >>> loss = held_out_loss(*load("campus-nano"))
    >>> classifier, tokenizer = load("campus-nano", head="classification", labels=["bad", "good"])
    >>> abs(held_out_loss(classifier, tokenizer) - loss) < 1e-4
    True

    tokenizer: the model's own. Losses in different tokens can't be compared, only what each of them grows by.

    Cost: 200 texts, about a second with campus-nano, three with campus-small.
    Raises: ValueError for a model that neither speaks nor has a causal body whose head is tied to its embeddings.
    """
    texts = load(TEXT)["test"].to_list()
    examples = encode(texts, tokenizer, kind="generation")
    if speaks(model):
        return evaluate(model, examples, batch_size=batch_size)["loss"]
    body, stack = _causal_body(model, examples[0]["input_ids"]), collator(model)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    summed, targets = 0.0, 0
    with evaluating(model), fresh_casts():
        for start in range(0, len(order), batch_size):
            batch = stack([examples[i] for i in order[start : start + batch_size]])
            labels = batch.pop("labels")
            hidden = _taken_back(body, _read(body, batch))
            states, labels = aligned(hidden, labels.to(hidden.device), shifted=True)
            counted = labels != IGNORED
            logits = linear(states[counted], body.get_input_embeddings().weight)  # (targets, vocabulary)
            summed += cross_entropy(logits.float(), labels[counted], reduction="sum").item()
            targets += int(counted.sum())
    return summed / targets


def _causal_body(model: Any, tokens: Tensor) -> Any:
    """What a classifier stands on, if its states can be asked for the next token. Raises: ValueError if not."""
    body = getattr(model, "base_model", model)
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if body is not model and tied and int(tokens.max()) < len(model.get_input_embeddings().weight):
        other = torch.cat([tokens[:-1], tokens[1:2]])
        with evaluating(model), fresh_casts():
            one, two = (_read(body, {"input_ids": ids[None]}) for ids in (tokens, other))
        if torch.allclose(one[:, :-1], two[:, :-1], atol=1e-4) and not torch.equal(one[:, -1], two[:, -1]):
            return body  # what comes later is not seen earlier
    raise ValueError(
        f"{type(model).__name__} can't be asked for the next word; expected a causal language model, or a classifier "
        "on the body of one whose head is tied to its embeddings, as the campus models' are"
    )


def _taken_back(body: nn.Module, states: Tensor) -> Tensor:
    """What output embeddings read where the body gives `states`: whoever changes what goes in may say `taken_back`."""
    hooks = [hook for module in body.modules() for hook in module._forward_pre_hooks.values()]
    for owner in reversed([getattr(hook, "__self__", None) for hook in hooks]):
        states = owner.taken_back(states) if hasattr(owner, "taken_back") else states
    return states


def _read(body: Any, batch: dict[str, Tensor]) -> Tensor:
    device = next(body.parameters()).device
    return body(**{key: value.to(device) for key, value in batch.items()}).last_hidden_state
