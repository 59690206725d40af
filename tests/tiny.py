"""Models, a tokenizer and data small enough for tests; everything is drawn from fixed seeds."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", "<sep>"]
TEXT = [
    "The baker likes the good bread. Answer: yes",
    "A bad day at the bank. Answer: no",
    "SELECT COUNT(*) FROM t;",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of the same form as the embedded models' own."""
    raw = Tokenizer(BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, show_progress=False, initial_alphabet=alphabet
    )
    raw.train_from_iterator(TEXT * 4, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <sep> $B", special_tokens=[(t, i) for i, t in enumerate(SPECIAL)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        mask_token="<mask>", sep_token="<sep>", cls_token="<s>", model_max_length=512, padding_side="right",
    )  # fmt: skip


def _llama_config(**settings: Any) -> LlamaConfig:
    return LlamaConfig(
        **{"vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
           "num_attention_heads": 2, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
           "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 512} | settings
    )  # fmt: skip


def llama(**settings: Any) -> LlamaForCausalLM:
    """A causal language model in the form of the embedded ones."""
    torch.manual_seed(0)
    return LlamaForCausalLM(_llama_config(**settings)).eval()


def llama_classifier(num_labels: int = 3, **settings: Any) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(_llama_config(num_labels=num_labels, **settings)).eval()


def bert(**settings: Any) -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        **{"vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
           "num_attention_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0} | settings
    )  # fmt: skip
    return BertForMaskedLM(config).eval()


def language_examples(
    n: int = 24, *, seed: int = 1, lengths: tuple[int, ...] = (5, 9, 7, 12)
) -> list[dict[str, Tensor]]:
    """Texts of different lengths, the first two tokens a prompt without labels."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for i in range(n):
        ids = torch.randint(6, 320, (lengths[i % len(lengths)],), generator=generator)
        labels = ids.clone()
        labels[:2] = -100
        examples.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return examples


def class_examples(n: int = 24, *, classes: int = 3, seed: int = 2) -> list[dict[str, Tensor]]:
    """Texts with a class as label."""
    examples = language_examples(n, seed=seed)
    return [{**example, "labels": torch.tensor(i % classes)} for i, example in enumerate(examples)]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters, to compare with later."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
