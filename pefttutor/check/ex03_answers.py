"""Notebook 03: the right answers, and those that learners write instead, each with its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

IGNORED = -100
Batch = dict[str, Tensor]
Rows = Sequence[Sequence[int]]

# ---- the reference solutions


def with_prompt(prompt: Tensor, embeds: Tensor, mask: Tensor, labels: Tensor) -> Batch:
    """[P; E(x)], the mask 1 and the labels −100 on P.   (P, d), (batch, n, d), (batch, n), (batch, n)."""
    batch, count = len(embeds), len(prompt)
    return {
        "inputs_embeds": torch.cat([prompt.expand(batch, -1, -1), embeds], dim=1),
        "attention_mask": torch.cat([mask.new_ones(batch, count), mask], dim=1),
        "labels": torch.cat([labels.new_full((batch, count), IGNORED), labels], dim=1),
    }


def label_start(table: Tensor, labels: Rows, drawn: Sequence[int], count: int) -> Tensor:
    """First rows: the labels' mean embeddings; the others: those of drawn words.   (vocabulary, d) → (count, d)."""
    rows = [table[torch.tensor(pieces)].mean(0) for pieces in labels] + [table[word] for word in drawn]
    return torch.stack(rows[:count]).detach()


def mixed_batch(prompts: Sequence[Tensor], task: Tensor, embeds: Tensor, mask: Tensor) -> Batch:
    """Before each text its own task's prompt, padded on the left; positions count what is read.   task (batch)."""
    longest = max(map(len, prompts))
    padded = torch.stack([pad(prompt, (0, 0, longest - len(prompt), 0)) for prompt in prompts])
    read = torch.stack([pad(mask.new_ones(len(prompt)), (longest - len(prompt), 0)) for prompt in prompts])
    attention_mask = torch.cat([read[task], mask], dim=1)
    return {
        "inputs_embeds": torch.cat([padded[task], embeds], dim=1),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
    }


# ---- what learners write instead


def _with(
    *,
    embeds: Callable[[Tensor, Tensor], Tensor] = lambda rows, embeds: torch.cat([rows, embeds], 1),
    mask: Callable[[Tensor, Tensor], Tensor] = lambda ones, mask: torch.cat([ones, mask], 1),
    labels: Callable[[Tensor, Tensor], Tensor] = lambda ignored, labels: torch.cat([ignored, labels], 1),
) -> Callable[..., Batch]:
    """Each argument says how what belongs to the prompt and what belongs to the text are put together."""
    theirs = {"embeds": embeds, "mask": mask, "labels": labels}

    def wrong_prompt(prompt: Tensor, embeds: Tensor, mask: Tensor, labels: Tensor) -> Batch:
        batch, count = len(embeds), len(prompt)
        return {
            "inputs_embeds": theirs["embeds"](prompt.expand(batch, -1, -1), embeds),
            "attention_mask": theirs["mask"](mask.new_ones(batch, count), mask),
            "labels": theirs["labels"](labels.new_full((batch, count), IGNORED), labels),
        }

    return wrong_prompt


def _behind(own: Tensor, text: Tensor) -> Tensor:
    return torch.cat([text, own], 1)


def _text_alone(own: Tensor, text: Tensor) -> Tensor:
    return text


PROMPT_MISTAKES = {
    "the prompt stands behind the text; a causal model reads from the left, so that no text would see it": _with(
        embeds=_behind, mask=_behind, labels=_behind
    ),
    "the embeddings have the prompt first, mask and labels have it last": _with(mask=_behind, labels=_behind),
    "the mask has the prompt's ones at its end, so that padding is read and text is not": _with(mask=_behind),
    "the labels have the prompt's −100 at their end: each stands too early": _with(labels=_behind),
    "the mask is 0 on the prompt: nothing looks at it": _with(
        mask=lambda ones, mask: torch.cat([0 * ones, mask], 1)
    ),
    "the mask is 1 on the padding too": _with(
        mask=lambda ones, mask: torch.cat([ones, torch.ones_like(mask)], 1)
    ),
    "the mask isn't lengthened": _with(mask=_text_alone),
    "the labels aren't lengthened": _with(labels=_text_alone),
    "the prompt's labels are 0, which is a token; −100 is what a loss leaves out": _with(
        labels=lambda ignored, labels: torch.cat([0 * ignored, labels], 1)
    ),
    "the prompt's labels are −1, which is no label at all; −100 is what a loss leaves out": _with(
        labels=lambda ignored, labels: torch.cat([torch.full_like(ignored, -1), labels], 1)
    ),
    "no label is left: the answer's own belong to the loss": _with(
        labels=lambda ignored, labels: torch.full_like(torch.cat([ignored, labels], 1), IGNORED)
    ),
    "the prompt takes the place of the text's first words; it comes before them": _with(
        embeds=lambda rows, embeds: torch.cat([rows, embeds[:, rows.shape[1] :]], 1),
        mask=_text_alone,
        labels=_text_alone,
    ),
    "the prompt is added to the text's first embeddings; it comes before them": _with(
        embeds=lambda rows, embeds: torch.cat(
            [embeds[:, : rows.shape[1]] + rows, embeds[:, rows.shape[1] :]], 1
        ),
        mask=_text_alone,
        labels=_text_alone,
    ),
    "the prompt is detached: no gradient reaches it": _with(
        embeds=lambda rows, embeds: torch.cat([rows.detach(), embeds], 1)
    ),
    "only the first text gets the prompt": _with(
        embeds=lambda rows, embeds: torch.cat([torch.cat([rows[:1], 0 * rows[1:]]), embeds], 1)
    ),
}


def _start(
    *,
    label: Callable[[Tensor], Tensor] = lambda pieces: pieces.mean(0, keepdim=True),
    keep: Callable[[Tensor], Tensor] = lambda rows: rows.detach(),
    order: int = 1,
    draw: bool = True,
    cut: bool = True,
) -> Callable[..., Tensor]:
    """label: the rows of one label's pieces. order −1: the drawn words come first."""

    def wrong_start(table: Tensor, labels: Rows, drawn: Sequence[int], count: int) -> Tensor:
        first = torch.cat([label(table[torch.tensor(pieces)]) for pieces in labels])
        others = table[torch.tensor(list(drawn))] if draw else first[:0]
        rows = torch.cat([first, others][::order])
        return keep(rows[:count] if cut else rows)

    return wrong_start


def _tiled(table: Tensor, labels: Rows, drawn: Sequence[int], count: int) -> Tensor:
    rows = label_start(table, labels, [], len(labels))
    return rows.repeat(1 + count // len(rows), 1)[:count]


def _one_mean(table: Tensor, labels: Rows, drawn: Sequence[int], count: int) -> Tensor:
    middle = label_start(table, labels, [], len(labels)).mean(0, keepdim=True)
    return torch.cat([middle.expand(len(labels), -1), table[torch.tensor(list(drawn))].detach()])[:count]


START_MISTAKES = {
    "a label of several pieces is summed; their mean is wanted": _start(
        label=lambda pieces: pieces.sum(0, keepdim=True)
    ),
    "of a label only its first piece is taken": _start(label=lambda pieces: pieces[:1]),
    "of a label only its last piece is taken": _start(label=lambda pieces: pieces[-1:]),
    "each piece of a label has a row of its own": _start(label=lambda pieces: pieces),
    "the drawn words come first; the labels should": _start(order=-1),
    "the drawn words are left out": _start(draw=False),
    "there are more rows than `count`": _start(cut=False),
    "the other rows repeat the labels, as HF PEFT's start from a text does; drawn words are wanted": _tiled,
    "every label has the mean of all labels": _one_mean,
    "the start hangs on the table by its graph; a start is numbers alone": _start(keep=lambda rows: rows),
    "the rows are brought to length 1; a word's length belongs to it": _start(
        keep=lambda rows: torch.nn.functional.normalize(rows.detach(), dim=1)
    ),
}


def _mixed(
    *,
    choose: Callable[[Tensor], Tensor] = lambda task: task,
    between: bool = False,
    read_all: bool = False,
    text: Callable[[Tensor], Tensor] = lambda mask: mask,
    keep: Callable[[Tensor], Tensor] = lambda prompt: prompt,
    positions: Callable[[Tensor, int], Tensor] = lambda read, longest: read.cumsum(1) - 1,
) -> Callable[..., Batch]:
    """between: the padding stands between prompt and text. positions(mask, tokens before the text)."""

    def wrong_batch(prompts: Sequence[Tensor], task: Tensor, embeds: Tensor, mask: Tensor) -> Batch:
        longest, which = max(map(len, prompts)), choose(task).tolist()
        rows, read = [], []
        for number in which:
            lack = longest - len(prompts[number])
            sides = (0, lack) if between else (lack, 0)
            rows.append(pad(keep(prompts[number]), (0, 0, *sides)))
            read.append(pad(mask.new_ones(longest - lack), sides, value=int(read_all)))
        attention_mask = torch.cat([torch.stack(read), text(mask)], dim=1)
        return {
            "inputs_embeds": torch.cat([torch.stack(rows), embeds], dim=1),
            "attention_mask": attention_mask,
            "position_ids": positions(attention_mask, longest).clamp(min=0),
        }

    return wrong_batch


def _shortest(prompts: Sequence[Tensor], task: Tensor, embeds: Tensor, mask: Tensor) -> Batch:
    shortest = min(map(len, prompts))
    return mixed_batch([prompt[:shortest] for prompt in prompts], task, embeds, mask)


MIXED_MISTAKES = {
    "every text has the first prompt; `task` says which is its own": _mixed(choose=lambda task: 0 * task),
    "text i has prompt i; `task[i]` is its number": _mixed(
        choose=lambda task: torch.arange(len(task)) % (int(task.max()) + 1)
    ),
    "the batch's order is turned": _mixed(choose=lambda task: task.flip(0)),
    "the padding stands between prompt and text; here it comes before the prompt": _mixed(between=True),
    "the mask is 1 on the padding before a short prompt: zeros are read as words": _mixed(
        read_all=True, positions=lambda read, longest: read.cumsum(1) - 1
    ),
    "all prompts are cut to the shortest": _shortest,
    "the text's own padding is read": _mixed(text=torch.ones_like),
    "the prompts are detached: no gradient reaches them": _mixed(keep=lambda prompt: prompt.detach()),
    "positions count the padding: a text behind a short prompt isn't where it is alone": _mixed(
        positions=lambda read, longest: torch.arange(read.shape[1]).expand(read.shape)
    ),
    "positions begin at 1": _mixed(positions=lambda read, longest: read.cumsum(1)),
    "positions begin at 0 again with the text; the prompt comes before it": _mixed(
        positions=lambda read, longest: torch.cat(
            [read[:, :longest].cumsum(1) - 1, read[:, longest:].cumsum(1) - 1], 1
        )
    ),
    "the positions are those of the text alone: it comes after its prompt": _mixed(
        positions=lambda read, longest: torch.arange(read.shape[1]).expand(read.shape) - longest
    ),
}
