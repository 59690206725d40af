"""Prompt tuning: train vectors that the frozen model reads before each text, as if they were words.

[P; E(x)]          only P trains
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttutor.data.trial import special_tokens
from pefttutor.method import DEFAULT, attaching
from pefttutor.parts.attachment import added_key
from pefttutor.parts.freezing import fully_trained, train_fully
from pefttutor.parts.network import Itself
from pefttutor.parts.settings import check_choice, check_names, check_whole, shown
from pefttutor.parts.streams import token_table
from pefttutor.parts.virtual_tokens import put_before

__all__ = ["PromptTuning"]

BEFORE = "PromptTuning stands before a text's"
COMMON = 5000  # a vocabulary begins with its most common pieces


@dataclass(frozen=True, kw_only=True)
class PromptTuning:
    """Train `num_virtual_tokens` embeddings in front of every text, and nothing else.

    f([P; E(x)])          P (num_virtual_tokens, d), E(x) (n, d) the frozen embeddings of the text

    >>> from pefttutor.models import load
    >>> model, tokenizer = load("campus-nano")
    >>> method, words = PromptTuning(num_virtual_tokens=4), tokenizer(["yes", "no"], add_special_tokens=False)
    >>> model = method.attach(model, words["input_ids"])                        # two rows start as these words
    >>> model.model.prompt.shape[0], method.count(model) == model.model.prompt.numel()
    (4, True)

    num_virtual_tokens: how many, P; the paper takes 1 to 150. Texts may be that much shorter.
    init: where the rows start that `attach` gets no words for: "vocabulary", words drawn from the 5,000 most common
        ones (the first of the vocabulary, special tokens left out), or "random", uniform in [−½, ½].
    modules_to_save: modules that train fully and are saved along, such as a new head ("score", "classifier").
    init_seed: fixes what is drawn, whatever the device.

    Never the identity at its start: the model reads other words. A mask, positions and a cache grow by P inside of the
    model; logits, labels and the texts' own places stay as they were. With padding on the left the virtual tokens stand
    between it and the text. An encoder's pooled token is still the text's first, and an encoder-decoder reads them in
    its encoder, as the paper has it; its decoder sees them there.

    Shapes: P (num_virtual_tokens, d), d the width of the token embeddings.
    Cost: it trains P · d values (`count`), and every text takes P tokens more. The backward pass crosses all layers,
        so activations are hardly fewer than in full fine-tuning.
    Raises: ValueError for a model that reads no tokens, or not as embeddings; in a call, for a cache that was filled
        without the prompt, or a mask that isn't one value a token.
    Source: Lester et al. 2021, arXiv:2104.08691, section 2; its rate is .3, a hundred times a usual one.
    """

    num_virtual_tokens: int = 20
    init: str = "vocabulary"
    modules_to_save: Collection[str] = ()
    init_seed: int = 0

    def __post_init__(self) -> None:
        check_whole(self, "num_virtual_tokens")
        check_choice(self, "init", ("vocabulary", "random"))
        check_whole(self, "init_seed", least=0)
        check_names(self, "modules_to_save")

    def attach(self, model: nn.Module, start: Any = None, *, name: str = DEFAULT) -> nn.Module:
        """Freeze `model`, let it read the virtual tokens before each text, and return it.

        start: what the first rows start as: for each a token id, or several whose embeddings are averaged, such as a
            class label's; or a tensor (rows, d), such as a prompt that was learned on another task. The other rows
            start as `init` says.

        Raises: ValueError if the name is in use, the start doesn't fit, or the model can't read virtual tokens. The
            model is then as it was.
        """
        with attaching(model, self, name) as new:
            table = token_table(model, BEFORE)
            key, count = added_key("prompt", name), self.num_virtual_tokens
            prompt = nn.Parameter(self._start(model, table, start))
            for part in put_before(model, count, Itself(key), {key: prompt}, note=key, what=BEFORE):
                new.add(part)
            for part in train_fully(model, (), self.modules_to_save):
                new.add(part)
        return model

    def count(self, model: nn.Module) -> int:
        """How many values train, without attaching: num_virtual_tokens · d, and modules_to_save."""
        fully, _ = fully_trained(model, self.modules_to_save)
        whole = sum(model.get_parameter(name).numel() for name in fully)
        return self.num_virtual_tokens * token_table(model, BEFORE).shape[1] + whole

    def _start(self, model: nn.Module, table: Tensor, start: Any) -> Tensor:
        """The prompt at its start, in float32 at least: small steps would be rounded away in a half."""
        generator = torch.Generator().manual_seed(self.init_seed)
        first = _given(table, start, self.num_virtual_tokens)
        missing = self.num_virtual_tokens - len(first)
        if self.init == "random":
            drawn = torch.rand(missing, table.shape[1], generator=generator).sub(0.5).to(first)
        else:
            words = sorted(set(range(min(len(table), COMMON))) - special_tokens(model)) or [0]
            order = torch.randperm(len(words), generator=generator).repeat(1 + missing // len(words))[
                :missing
            ]
            drawn = table[torch.tensor(words, device=table.device)[order.to(table.device)]].to(first)
        return torch.cat([first, drawn])


def _given(table: Tensor, start: Any, count: int) -> Tensor:
    """The rows that are given. Shapes: → (at most count, d)."""
    table = table.detach()
    wide = torch.promote_types(table.dtype, torch.float32)
    if start is None:
        return table[:0].to(wide)
    if isinstance(start, Tensor) and start.is_floating_point():
        if start.dim() != 2 or start.shape[1] != table.shape[1] or len(start) > count:
            raise ValueError(f"start is {tuple(start.shape)}, expected at most ({count}, {table.shape[1]}).")
        return start.detach().to(table.device, wide)
    rows = start.tolist() if isinstance(start, Tensor) else start
    words = [[word] if isinstance(word, int) else word for word in rows] if isinstance(rows, Sequence) else []
    whole = all(
        isinstance(word, Sequence) and word and all(i in range(len(table)) for i in word) for word in words
    )
    if not whole or not 0 < len(words) <= count:
        raise ValueError(
            f"start is {shown(start)}; expected token ids below {len(table)}, or several for each row, at most {count} "
            "rows, such as tokenizer(['yes', 'no'], add_special_tokens=False)['input_ids']."
        )
    return torch.stack([table[torch.tensor(word, device=table.device)].to(wide).mean(0) for word in words])
