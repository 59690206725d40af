"""`generate`: greedy answers to a list of prompts."""

from collections.abc import Sequence
from typing import Any

import torch

from pefttutor.data.batches import collate
from pefttutor.data.encoding import prompt_ids

__all__ = ["begun", "generate", "speaks"]


def speaks(model: Any) -> bool:
    """Whether a model answers in words: a decoder that can generate."""
    can = getattr(model, "can_generate", None)
    return can is not None and can() and not getattr(model.config, "is_encoder_decoder", False)


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int = 32,
    max_length: int = 512,
) -> list[str]:  # fmt: skip
    """Greedy continuations, up to the tokenizer's end token or one of those in the model's `generation_config`.

    Batched with padding on the left, with a key-value cache. Prompts of similar length share a batch. A prompt longer
    than `max_length` loses its start; an empty one is begun with the tokenizer's first token.

    Raises: ValueError for an empty prompt if the tokenizer has no token to begin with.
    """
    from transformers import GenerationConfig

    device, ends = next(model.parameters()).device, _ends(model, tokenizer)
    pad = next((i for i in (tokenizer.pad_token_id, *ends) if i is not None and i >= 0), 0)
    greedy = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, use_cache=True, pad_token_id=pad,
        eos_token_id=ends or None, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    encoded = [torch.tensor(begun(tokenizer, prompt_ids(tokenizer, p)[0])[-max_length:]) for p in prompts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    answers = [""] * len(encoded)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [{"input_ids": encoded[i], "attention_mask": torch.ones_like(encoded[i])} for i in chosen]
        batch = {key: value.to(device) for key, value in collate(rows, pad, "left").items()}
        made = model.generate(**batch, generation_config=greedy)[:, batch["input_ids"].shape[1] :]
        for i, ids in zip(chosen, made.tolist(), strict=True):
            stop = next((k for k, token in enumerate(ids) if token in ends), len(ids))
            answers[i] = tokenizer.decode(ids[:stop], skip_special_tokens=True)
    return answers


def begun(tokenizer: Any, ids: list[int]) -> list[int]:
    """The tokens of a prompt; in place of none, the one with which a text begins. Raises: ValueError without one."""
    if ids:
        return ids
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ValueError(
            "a prompt is empty, and the tokenizer has neither bos_token nor eos_token to begin with: a model needs a "
            "token to go on from. Write something into the prompt"
        )
    return [first]


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = list(own) if isinstance(own, (list, tuple)) else [own]
    return list(dict.fromkeys(i for i in (tokenizer.eos_token_id, *several) if i is not None))
