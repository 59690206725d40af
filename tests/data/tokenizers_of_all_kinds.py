"""Small tokenizers of the kinds that are in use: they differ in where a blank goes and in what is put around a text."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import SPECIAL, TEXT, tokenizer

LETTERS = sorted({letter for text in TEXT for letter in text} | set("abcdefghijklmnopqrstuvwxyz\n▁:.!"))


def _trained(raw: Tokenizer, *, closing: str = "", opening: str = "<s> ") -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, show_progress=False, initial_alphabet=LETTERS
    )
    raw.train_from_iterator([*TEXT * 4, "yes\nno\nyes"], trainer)
    raw.post_processor = processors.TemplateProcessing(
        single=f"{opening}$A{closing}", special_tokens=[(t, i) for i, t in enumerate(SPECIAL)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def like_llama() -> PreTrainedTokenizerFast:
    """A ▁ before every text, one in the place of every blank, and words that nothing cuts apart."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return _trained(raw)


def like_t5() -> PreTrainedTokenizerFast:
    """A ▁ before every word, also the first one, and </s> behind every text."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.normalizer = normalizers.NFKC()
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace(prepend_scheme="always")
    return _trained(raw, opening="", closing=" </s>")


def like_roberta() -> PreTrainedTokenizerFast:
    """Bytes, with a blank before every text."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw.decoder = decoders.ByteLevel()
    return _trained(raw)


def with_blanks_behind(*, across: bool = False) -> PreTrainedTokenizerFast:
    """A blank belongs to the word before it; `across`: tokens go on over it, so that frequent words are one."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.pre_tokenizer = None if across else pre_tokenizers.Split("▁", "merged_with_previous")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return _trained(raw)


def like_bert() -> PreTrainedTokenizerFast:
    """Words and what follows them, in lower case; blanks and what can't be seen are left out."""
    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=320, special_tokens=SPECIAL, show_progress=False, initial_alphabet=LETTERS
    )
    raw.train_from_iterator(TEXT * 4, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A <sep>", special_tokens=[(t, i) for i, t in enumerate(SPECIAL)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", cls_token="<s>", sep_token="<sep>", unk_token="<unk>"
    )


KINDS = {"gpt2": tokenizer, "llama": like_llama, "t5": like_t5, "roberta": like_roberta, "bert": like_bert}
