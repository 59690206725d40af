"""Models, batches, examples and a tokenizer small enough for tests: everything is drawn from fixed seeds.

`tiny_model("gpt2")` is any architecture of KINDS, its weights spread so that an error shows; `tiny_model("net")` a
network of one's own, without anything of transformers. `llama()`, `llama_classifier()` and `bert()` have the form of
the embedded models, initialised as transformers does it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from torch.nn import functional as F

from pefttutor import AutoFreeze

VOCABULARY = 97
KINDS = ("llama", "gpt2", "bert", "t5", "vit")
TARGETS = {
    "llama": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
    "bert": ("query", "value"),
    "t5": ("q", "v"),
    "vit": ("q_proj", "v_proj"),
    "net": ("up", "down"),
}
CLASSES = {  # by name: a module of transformers takes a second to import, and most tests need one or two
    "llama": ("LlamaForCausalLM", "LlamaConfig"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config"),
    "bloom": ("BloomForCausalLM", "BloomConfig"),
    "bert": ("BertForSequenceClassification", "BertConfig"),
    "t5": ("T5ForConditionalGeneration", "T5Config"),
    "vit": ("ViTForImageClassification", "ViTConfig"),
}


# ---- models


def model_class(kind: str) -> Any:
    return getattr(hf, CLASSES[kind][0])


def tiny_config(
    kind: str,
    *,
    width: int = 24,
    feed_forward: int = 40,
    layers: int = 2,
    heads: int = 4,
    vocabulary: int = VOCABULARY,
    dropout: float = 0.0,
    **own: Any,
) -> Any:
    """A configuration of the given architecture. `own`: settings in the words of its own class, which count more."""
    tokens = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    both = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    wide = sizes | {"intermediate_size": feed_forward}
    decoder = tokens | wide | {"attention_dropout": dropout, "num_key_value_heads": heads // 2}
    settings: dict[str, dict[str, Any]] = {
        "llama": decoder | {"attention_bias": True},
        "qwen3": decoder,
        "gpt2": tokens | sizes | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
        "bloom": tokens | sizes | {"hidden_dropout": dropout, "attention_dropout": dropout},
        "bert": tokens | wide | both | {"max_position_embeddings": 32, "num_labels": 3},
        "t5": tokens | {"d_model": width, "d_kv": 5, "d_ff": feed_forward, "num_layers": layers}
        | {"num_heads": heads, "dropout_rate": dropout, "decoder_start_token_id": 0},
        "vit": wide | both | {"image_size": 8, "patch_size": 4, "num_labels": 3},
    }  # fmt: skip
    settings["gpt2"]["n_positions"] = 32
    return getattr(hf, CLASSES[kind][1])(**(settings[kind] | own))


def made(make: Callable[..., nn.Module], *arguments: Any, seed: int = 0, spread: bool = False) -> Any:
    """What a class makes with the random numbers of `seed`, in evaluation mode; nobody else's are drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make(*arguments)
        for parameter in model.parameters() if spread else ():
            values = parameter.data  # biases start at 0 and weights tiny: an error would hide there
            if values.dim() == 1:
                values.copy_(values.mean().round() + 0.1 * torch.randn_like(values))
            else:
                values.mul_(0.25 / values.std())
    return model.eval()


def tiny_model(
    kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: object
) -> nn.Module:
    """A model of the given architecture in evaluation mode, with non-square weights and without dropout."""
    if kind == "net":
        return made(Net, seed=seed, spread=True).to(dtype)
    return made(model_class(kind), tiny_config(kind, **overrides), seed=seed, spread=True).to(dtype)


class Block(nn.Module):
    """Normalise, widen, narrow, and add."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """A network of one's own: no config, one tensor in and one out, statistics and a buffer that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.scale = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.classifier = nn.Linear(8, 3)
        self.register_buffer("offset", torch.randn(6))
        self.scale.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.scale(self.enter(x - self.offset))
        for block in self.blocks:
            x = block(x)
        return self.classifier(x)


class Quantised(nn.Module):
    """A stand-in for a quantised linear layer: 8-bit weights with a scale for each output, and a bias; all buffers."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (layer.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", layer.bias.detach().clone())

    def dense_weight(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense_weight(), self.bias)


def llama(**settings: Any) -> Any:
    """A causal language model in the form of the embedded ones."""
    return _embedded(hf.LlamaForCausalLM, "llama", settings)


def llama_classifier(num_labels: int = 3, **settings: Any) -> Any:
    return _embedded(hf.LlamaForSequenceClassification, "llama", {"num_labels": num_labels} | settings)


def bert(**settings: Any) -> Any:
    """A masked language model, with dropout."""
    return _embedded(hf.BertForMaskedLM, "bert", {"dropout": 0.1, "max_position_embeddings": 128} | settings)


def _embedded(make: type[nn.Module], kind: str, settings: dict[str, Any]) -> Any:
    sizes = {"vocabulary": 320, "width": 16, "feed_forward": 24, "heads": 2}
    form = {"mlp_bias": True, "tie_word_embeddings": True, "max_position_embeddings": 512}
    form |= {"num_key_value_heads": 2}
    return made(make, tiny_config(kind, **(sizes | (form if kind == "llama" else {}) | settings)))


def checkpointed(model: Any, *, reentrant: bool) -> Any:
    """The model with activation checkpointing on, by the name that its transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    return model


def redraw_factors(model: nn.Module, seed: int = 1, std: float = 0.2) -> nn.Module:
    """Non-zero values for everything that trains, as after some training: with B = 0 half the errors don't show."""
    g = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            draw = torch.randn(parameter.shape, generator=g, dtype=torch.float64) * std
            parameter.data.copy_(draw)
    return model


def freeze_one_block(model: nn.Module) -> nn.Module:
    """AutoFreeze as if it had decided to freeze one block."""
    method = AutoFreeze(interval=100)
    method.attach(model)
    model.get_buffer("autofreeze_frozen").fill_(1)
    method.after_backward(model, 0)
    return model


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Whether both have the same names, and under each the same bits."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters, to compare with later."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the base's own parameters, without what a method has added."""
    added = (
        "_values", "_scores", "_delta", "_alpha", "_group", "special", "lora_A", "lora_B", "ia3_l", "prompt"
    )  # fmt: skip
    return {
        name: values for name, values in weights(model).items() if not name.partition("@")[0].endswith(added)
    }


# ---- data


def tiny_batch(kind: str, *, side: str = "right", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Three examples with labels: sentences of 9, 6 and 4 tokens padded on one side, pictures, or rows of numbers."""
    g = torch.Generator().manual_seed(7)
    if kind in ("vit", "net"):
        key, shape = {"vit": ("pixel_values", (3, 8, 8)), "net": ("x", (6,))}[kind]
        values = torch.randn(3, *shape, generator=g, dtype=torch.float64).to(dtype)
        return {key: values, "labels": torch.tensor([0, 2, 1])}
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=g)
    places = torch.arange(9).expand(3, 9)
    lengths = torch.tensor([[9], [6], [4]])
    mask = (places < lengths) if side == "right" else (places >= 9 - lengths)
    ids = ids * mask  # pad is 0
    labels = torch.tensor([0, 2, 1]) if kind == "bert" else ids.masked_fill(~mask, -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def rows_of(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The batch's examples one by one, as `fit` and the choosers take them."""
    return [{key: value[i] for key, value in batch.items()} for i in range(len(batch["labels"]))]


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


SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", "<sep>"]
TEXT = [
    "The baker likes the good bread. Answer: yes",
    "A bad day at the bank. Answer: no",
    "SELECT COUNT(*) FROM t;",
]


def tokenizer() -> hf.PreTrainedTokenizerFast:
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
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        mask_token="<mask>", sep_token="<sep>", cls_token="<s>", model_max_length=512, padding_side="right",
    )  # fmt: skip
