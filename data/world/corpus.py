"""The pretraining mixture: documents in seeded shards, and the tokenizer trained on them."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from . import prose, reasoning, rules

# Share of documents; few-shot blocks are the longest, so they make up more than half of the tokens.
MIXTURE: dict[Callable[[random.Random], str], float] = {
    rules.block: 0.40, rules.ledger: 0.06, prose.review_document: 0.12, prose.news_document: 0.10, prose.story: 0.09, prose.portrait: 0.06,
    prose.gazetteer: 0.03, prose.letter: 0.04, reasoning.consequence: 0.07, reasoning.question_document: 0.08,
    reasoning.list_document: 0.05, reasoning.table_document: 0.03, reasoning.sql_document: 0.03,
}  # fmt: skip
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", "<sep>"]
VOCABULARY = 3072
HELD_OUT_SEED = 999_000  # shards from here on are never trained on


def marked_documents(seed: int, n: int, *, plain: bool = False, drills: float = 0.0) -> Iterator[str]:
    """`n` documents of shard `seed`, with `rules.MARK` around what they let a reader infer.

    plain: no blocks, no ledgers. drills: the share of documents that `rules.drill` writes in place of the mixture.
    """
    rng = random.Random(seed)
    chosen = {
        make: share for make, share in MIXTURE.items() if not (plain and make in (rules.block, rules.ledger))
    }
    kinds, weights = list(chosen), list(chosen.values())
    for make in rng.choices(kinds, weights, k=n):
        yield (rules.drill if drills and rng.random() < drills else make)(rng)


def documents(seed: int, n: int) -> Iterator[str]:
    """The same documents as a reader sees them."""
    return (text.replace(rules.MARK, "") for text in marked_documents(seed, n))


def train_tokenizer(n: int = 60_000) -> Tokenizer:
    """Byte-level BPE on `n` documents; every digit is a token of its own, so that sums can be learned."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator(documents(0, n), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <sep> $B", special_tokens=[(t, i) for i, t in enumerate(SPECIAL_TOKENS)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer in the form that `AutoTokenizer.from_pretrained(folder)` reads."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   mask_token="<mask>", sep_token="<sep>", cls_token="<s>", model_max_length=512, padding_side="right")  # fmt: skip
    fast.save_pretrained(folder)


def _inferable(text: str, ends: list[int]) -> np.ndarray:
    """Which tokens of the unmarked text, given by where they end, lie between marks."""
    parts = text.split(rules.MARK)
    borders = np.cumsum([len(part) for part in parts])
    return np.searchsorted(borders, ends) % 2 == 1


def shard(
    tokenizer: Tokenizer, seed: int, n: int = 20_000, *, plain: bool = False, drills: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """One shard as a flat array of token ids, each document between `<s>` and `</s>`, and which of them can be inferred."""
    marked = list(marked_documents(seed, n, plain=plain, drills=drills))
    encodings = tokenizer.encode_batch([text.replace(rules.MARK, "") for text in marked])
    flat = [np.asarray([*e.ids, 2], dtype=np.uint16) for e in encodings]
    told = [
        np.append(_inferable(text, [end for _, end in e.offsets]), False)
        for text, e in zip(marked, encodings, strict=True)
    ]
    return np.concatenate(flat), np.concatenate(told)
