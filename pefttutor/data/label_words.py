"""Which of a few answers a language model finds likeliest behind each prompt."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pefttutor.data.batches import collate
from pefttutor.data.checks import check_counts
from pefttutor.data.encoding import split_ids
from pefttutor.data.generation import begun
from pefttutor.data.targets import IGNORED, aligned
from pefttutor.data.trial import close_enough

__all__ = ["likeliest"]


@torch.no_grad()
def likeliest(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    words: Sequence[str],
    *,
    batch_size: int,
    max_length: int,
) -> list[int]:
    """Which word follows each prompt with the largest mean log-probability a token: those of several stay comparable.

    A prompt is read once, and the words go on from its cached keys and values, where the model can do that: it is
    tried on the shortest and the longest prompt. Else every word is read behind every prompt.

    >>> from pefttutor.models import load
    >>> prompts, words = ["Good", "The music could not have"], [" evening", " been"]
    >>> likeliest(*load("campus-nano"), prompts, words, batch_size=2, max_length=16)
    [0, 1]

    Raises: ValueError for a word of which the tokenizer leaves nothing, and one that leaves no room for a prompt.
    """
    check_counts(batch_size=batch_size, max_length=max_length)
    groups: dict[tuple[tuple[int, ...], ...], list[tuple[int, list[int]]]] = defaultdict(list)
    for i, prompt in enumerate(prompts):  # in practice all prompts share the words' tokens
        ids, behind = split_ids(tokenizer, prompt, words)
        if [] in behind:
            raise ValueError(f"the label {words[behind.index([])]!r} has no token; expected a word to choose")
        groups[tuple(map(tuple, behind))].append((i, begun(tokenizer, ids)))
    chosen = [0] * len(prompts)
    for answers, members in groups.items():
        members.sort(key=lambda member: len(member[1]))
        longest = max(map(len, answers))
        if (room := max_length - longest) < 1:
            word = words[[*map(len, answers)].index(longest)]
            raise ValueError(
                f"max_length={max_length}, and the label {word!r} takes {longest} tokens; expected at least "
                f"{longest + 1}, so that there is a prompt before it"
            )
        cut = [ids[-room:] for _, ids in members]
        means = _continued if _goes_on(model, tokenizer, [cut[0], cut[-1]], answers) else _read_again
        for start in range(0, len(cut), batch_size):
            best = means(model, tokenizer, cut[start : start + batch_size], answers).argmax(1).tolist()
            for (i, _), k in zip(members[start : start + batch_size], best, strict=True):
                chosen[i] = k
    return chosen


def _goes_on(model: Any, tokenizer: Any, prompts: list[list[int]], answers: Sequence[Sequence[int]]) -> bool:
    """Whether going on from cached prompts gives what reading everything again gives."""
    again = _read_again(model, tokenizer, prompts, answers)
    try:
        found = _continued(model, tokenizer, prompts, answers)
    except Exception:  # no such cache, no such arguments, a cache that can't be repeated
        return False
    return torch.allclose(found, again, atol=close_enough(model), rtol=0)


def _read_again(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], answers: Sequence[Sequence[int]]
) -> Tensor:
    """Mean log-probability of each answer's tokens after each prompt: (prompts, answers)."""
    device, pad = next(model.parameters()).device, tokenizer.pad_token_id
    found = []
    for answer in answers:
        rows = [torch.tensor([*prompt, *answer]) for prompt in prompts]
        # Padded on the right: what comes later changes nothing.
        batch = collate(
            [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in rows], pad
        )
        for row, prompt in zip(batch["labels"], prompts, strict=True):
            row[: len(prompt)] = IGNORED
        labels = batch.pop("labels").to(device)
        out = model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False)
        found.append(_mean_logs(*aligned(out.logits, labels, shifted=True)))
    return torch.stack(found, 1)


def _continued(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], answers: Sequence[Sequence[int]]
) -> Tensor:
    """The same, from one pass over the prompts and one over the answers behind them."""
    device = next(model.parameters()).device
    rows = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in map(torch.tensor, prompts)]
    read = {key: value.to(device) for key, value in collate(rows, tokenizer.pad_token_id, "left").items()}
    mask = read["attention_mask"]
    places = (mask.cumsum(-1) - 1).clamp(min=0)  # (prompts, seq)
    out = model(**read, position_ids=places, use_cache=True)
    words = pad_sequence([torch.tensor(a, device=device) for a in answers], True, IGNORED)
    n, k, longest = len(prompts), *words.shape  # words (answers, longest)
    first = out.logits[:, -1].float().log_softmax(-1)[:, words[:, 0]]  # (prompts, answers)
    if longest == 1:
        return first
    name = "cache" if "cache" in out else "past_key_values"  # transformers renamed it in 5.24
    cache = {name: out[name]}
    cache[name].batch_repeat_interleave(k)
    given = words[:, :-1].clamp(min=0).repeat(n, 1)  # (prompts · answers, longest − 1)
    mask = torch.cat([mask.repeat_interleave(k, 0), torch.ones_like(given)], 1)
    after = places[:, -1:].repeat_interleave(k, 0) + torch.arange(1, longest, device=device)
    logits = model(input_ids=given, attention_mask=mask, position_ids=after, **cache).logits
    rest = words[:, 1:].repeat(n, 1)
    summed = _logs(logits, rest).sum(1).view(n, k) + first
    return summed / (words != IGNORED).sum(1)


def _mean_logs(logits: Tensor, labels: Tensor) -> Tensor:
    return _logs(logits, labels).sum(1) / (labels != IGNORED).sum(1)


def _logs(logits: Tensor, labels: Tensor) -> Tensor:
    """log p of each label, 0 where there is none. Shapes: (n, seq, vocabulary), (n, seq) → (n, seq)."""
    taken = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return taken * (labels != IGNORED)
