"""`generate`: greedy answers to a list of prompts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from pefttutor.data.batches import collate
from pefttutor.data.checks import check_counts
from pefttutor.data.encoding import prompt_ids
from pefttutor.data.trial import close_enough

__all__ = ["begun", "continued", "ends", "generate", "speaks"]


def speaks(model: Any) -> bool:
    """Whether a model answers in words: a decoder that can generate.

    >>> from pefttutor.models import load
    >>> speaks(load("campus-nano")[0]), speaks(load("campus-encoder")[0])
    (True, False)
    """
    can = getattr(model, "can_generate", None)
    return can is not None and can() and not getattr(model.config, "is_encoder_decoder", False)


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int = 32,
    max_length: int = 512,
) -> list[str]:  # fmt: skip
    """Greedy continuations, up to the tokenizer's end token or one of those in the model's `generation_config`.

    With a key-value cache; prompts of similar length share a batch, padded on the left, unless that changes what the
    model says (it is tried on the shortest and the longest one). A prompt longer than `max_length` loses its start;
    an empty one is begun with the tokenizer's first token.

    >>> from pefttutor.models import load
    >>> generate(*load("campus-nano"), ["The music could not have"], max_new_tokens=2)
    [' been more']

    Raises: ValueError for a number below 1, or an empty prompt if the tokenizer has no token to begin with.
    """
    found = continued(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, max_length=max_length
    )
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in found]


@torch.no_grad()
def continued(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int = 32,
    max_length: int = 512,
) -> list[tuple[list[int], bool]]:  # fmt: skip
    """What `generate` decodes: the new tokens, and whether an end token closed them, which isn't among them.

    >>> from pefttutor.models import load
    >>> [(len(ids), ended) for ids, ended in continued(*load("campus-nano"), ["The music"], max_new_tokens=2)]
    [(2, False)]

    Raises: what `generate` raises.
    """
    check_counts(max_new_tokens=max_new_tokens, batch_size=batch_size, max_length=max_length)
    closing = ends(model, tokenizer)
    pad = next((i for i in (tokenizer.pad_token_id, *closing) if i is not None and i >= 0), 0)
    make = partial(
        _made, model, pad, do_sample=False, num_beams=1, use_cache=True, pad_token_id=pad,
        eos_token_id=closing or None, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    encoded = [begun(tokenizer, prompt_ids(tokenizer, prompt)[0])[-max_length:] for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    if len(order) > 1 and not _bears_company(
        make, encoded[order[0]], encoded[order[-1]], close_enough(model)
    ):
        batch_size = 1
    found: list[tuple[list[int], bool]] = [([], False)] * len(encoded)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        made = make([encoded[i] for i in chosen], max_new_tokens=max_new_tokens)
        for i, ids in zip(chosen, made.tolist(), strict=True):
            stop = next((k for k, token in enumerate(ids) if token in closing), len(ids))
            found[i] = ids[:stop], stop < len(ids)
    return found


def _made(model: Any, pad: int, prompts: Sequence[list[int]], **settings: Any) -> Any:
    """What `model.generate` adds to some prompts; with `output_logits`, the logits of its first token."""
    from transformers import GenerationConfig

    greedy = GenerationConfig(**settings)
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in map(torch.tensor, prompts)]
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in collate(rows, pad, "left").items()}
    with _plainly(model):
        made = model.generate(**batch, generation_config=greedy)
    return made.logits[0] if settings.get("output_logits") else made[:, batch["input_ids"].shape[1] :]


@contextmanager
def _plainly(model: Any) -> Iterator[None]:
    """Within the block the model's own settings, such as a penalty for repetition, add nothing to the given ones."""
    own = getattr(model, "generation_config", None)
    before = dict(vars(own)) if own is not None else {}
    try:
        if own is not None:
            vars(own).update(vars(type(own)()))
        yield
    finally:
        if own is not None:
            vars(own).clear()
            vars(own).update(before)


def _bears_company(make: Callable[..., Any], short: list[int], long: list[int], exact: float) -> bool:
    """Whether the short prompt has the same logits beside the long one: not in a model that counts padding as text."""
    look = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    alone, beside = (make(prompts, **look)[0].float() for prompts in ([short], [short, long]))
    return torch.allclose(alone.log_softmax(-1), beside.log_softmax(-1), atol=exact, rtol=0)


def begun(tokenizer: Any, ids: list[int]) -> list[int]:
    """The tokens of a prompt; in place of none, the one with which a text begins.

    >>> from types import SimpleNamespace
    >>> tokenizer = SimpleNamespace(bos_token_id=1)
    >>> begun(tokenizer, []), begun(tokenizer, [7, 8])
    ([1], [7, 8])

    Raises: ValueError without such a token.
    """
    if ids:
        return ids
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ValueError(
            "a prompt is empty, and the tokenizer has neither bos_token nor eos_token to begin with: a model needs a "
            "token to go on from. Write something into the prompt"
        )
    return [first]


def ends(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's first, then those of the model's `generation_config`.

    >>> from pefttutor.models import load
    >>> ends(*load("campus-nano"))
    [2]
    """
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = list(own) if isinstance(own, (list, tuple)) else [own]
    return list(dict.fromkeys(i for i in (tokenizer.eos_token_id, *several) if i is not None))
