"""The zoo: architectures of transformers, tiny and from fixed seeds, each with a batch, its usual targets and its head.

`python -m tests.architectures` runs every method on every one of them (see tests/test_every_architecture.py), prints
what holds as one table, and writes it to .github/architectures.md.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY, WIDTH = 50, 16
IMAGE_TOKEN = 49
FAMILIES = (
    "decoder", "encoder", "encoder–decoder", "state space", "mixture of experts", "vision", "speech",
    "vision and language",
)  # fmt: skip


# Layers were called otherwise in earlier versions of transformers.
FORMERLY = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "fc2": "output.dense",
    "lm_head": "embed_out",
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture.

    make, config: its class, and what makes its configuration. batch: of which kind (BATCHES). targets: the layers
    that LoRA usually adapts. scaled: (IA)³'s, the last of which is the feed-forward layer whose input is scaled.
    head: what a linear probe trains. generates: whether `generate` goes on from an input. past: modules whose weight
    the model reads without calling them, so that no part of it can be trained.
    """

    family: str
    make: type[Any]
    config: Callable[[], Any]
    batch: str
    targets: tuple[str, ...]
    scaled: tuple[str, ...]
    head: str
    generates: bool
    past: tuple[str, ...] = ()

    def build(self) -> Any:
        """A model in evaluation mode, each time the same."""
        return copy.deepcopy(_built(self.make, self.config))

    def names(self, model: nn.Module, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """The wanted names as they are in this version of transformers."""
        there = [f".{name}" for name, _ in model.named_modules()]
        return tuple(
            name if any(path.endswith(f".{name}") for path in there) else FORMERLY.get(name, name)
            for name in wanted
        )


@functools.cache
def _built(make: type[Any], config: Callable[[], Any]) -> Any:
    """Biases and norms start at 0 and 1, and weights tiny: an error would hide there, so they are spread."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(config())
        for parameter in model.parameters():
            values = parameter.data
            if not parameter.requires_grad:
                continue
            if values.dim() < 2:
                values.add_(0.1 * torch.randn_like(values))
            elif values.std() < 0.15:
                values.mul_(0.15 / values.std().clamp(min=1e-3)).add_(1e-3 * torch.randn_like(values))
    return model.eval()


# ---- batches


def _texts(kind: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCABULARY - 2, (3, 8), generator=g)
    mask = torch.arange(8).expand(3, 8) < torch.tensor([[8], [6], [5]])
    ids = ids * mask
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    if kind == "words":
        return batch | {"labels": ids.masked_fill(~mask, -100)}
    if kind == "class":
        return batch | {"labels": torch.tensor([0, 2, 1])}
    assert kind == "translation"
    return batch | {"labels": torch.randint(3, VOCABULARY - 2, (3, 5), generator=g)}


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def _pictured(image_tokens: int, **pictures: Tensor) -> dict[str, Tensor]:
    batch = _texts("words")
    n = len(batch["input_ids"])
    seen = torch.full((n, image_tokens), IMAGE_TOKEN)
    return {
        "input_ids": torch.cat([seen, batch["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(seen), batch["attention_mask"]], 1),
        "labels": torch.cat([torch.full_like(seen, -100), batch["labels"]], 1),
        **pictures,
    }


def _paligemma() -> dict[str, Tensor]:
    batch = _pictured(4, pixel_values=_numbers(3, 3, 8, 8))
    return batch | {"token_type_ids": (batch["labels"] != -100).long()}


def _clip() -> dict[str, Tensor]:
    batch = _texts("class")
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]} | {
        "pixel_values": _numbers(3, 3, 8, 8)
    }


BATCHES: Mapping[str, Callable[[], dict[str, Tensor]]] = {
    "words": lambda: _texts("words"),
    "class": lambda: _texts("class"),
    "translation": lambda: _texts("translation"),
    "pictures": lambda: {"pixel_values": _numbers(3, 3, 8, 8), "labels": torch.tensor([0, 2, 1])},
    "large pictures": lambda: {"pixel_values": _numbers(3, 3, 32, 32), "labels": torch.tensor([0, 2, 1])},
    "sound": lambda: {"input_values": _numbers(3, 200), "labels": torch.tensor([0, 2, 1])},
    "spectrogram": lambda: {"input_features": _numbers(3, 8, 24), "labels": _texts("translation")["labels"]},
    "spectrogram class": lambda: {"input_features": _numbers(3, 8, 24), "labels": torch.tensor([0, 2, 1])},
    "picture and words": lambda: _pictured(4, pixel_values=_numbers(3, 3, 8, 8)),
    "picture before words": _paligemma,
    "picture and text": _clip,
}

# ---- configurations

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
_LLAMA = _TOKENS | _SIZES | {"intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 64}
_BERT = _TOKENS | _SIZES | {"intermediate_size": 24, "max_position_embeddings": 64, "num_labels": 3}
_BART = _TOKENS | {
    "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
    "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
_VIT = _SIZES | {"intermediate_size": 24, "image_size": 8, "patch_size": 4, "num_labels": 3}
_SOUND = _SIZES | {
    "intermediate_size": 24, "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "vocab_size": VOCABULARY, "num_labels": 3, "classifier_proj_size": 8,
    "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip
_WHISPER = {
    "vocab_size": VOCABULARY, "num_mel_bins": 8, "encoder_layers": 2, "decoder_layers": 2, "d_model": WIDTH,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    "max_source_positions": 12, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "num_labels": 3, "classifier_proj_size": 8,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip

_QV, _LLAMA_SCALED = ("q_proj", "v_proj"), ("k_proj", "v_proj", "down_proj")
_BERT_SCALED = ("key", "value", "output.dense")

ARCHITECTURES: dict[str, Architecture] = {}


def _add(
    name: str,
    family: str,
    make: str,
    batch: str,
    targets: tuple[str, ...],
    scaled: tuple[str, ...],
    head: str,
    settings: Mapping[str, Any],
    *,
    config: Callable[[], Any] | None = None,
    generates: bool = False,
) -> None:
    own, kind = dict(settings), getattr(hf, make)
    past = own.pop("past", ())
    ARCHITECTURES[name] = Architecture(
        family=family,
        make=kind,
        config=config or functools.partial(kind.config_class, **own),
        batch=batch,
        targets=targets,
        scaled=scaled,
        head=head,
        generates=generates,
        past=past,
    )


def _decoder(
    name: str, make: str, targets: Any = _QV, scaled: Any = _LLAMA_SCALED, head: str = "lm_head", **own: Any
) -> None:
    base, family = own.pop("base", _LLAMA), own.pop("family", "decoder")
    _add(name, family, make, "words", targets, scaled, head, base | own, generates=True)


_decoder("Llama", "LlamaForCausalLM", attention_bias=True)
_decoder("Mistral", "MistralForCausalLM", sliding_window=4)
_decoder("Qwen2", "Qwen2ForCausalLM", tie_word_embeddings=True)
_decoder("Qwen3", "Qwen3ForCausalLM", head_dim=8)
_decoder("Gemma2", "Gemma2ForCausalLM", head_dim=8, sliding_window=4)
_decoder("Gemma3", "Gemma3ForCausalLM", head_dim=8, sliding_window=4)
_decoder("Phi3", "Phi3ForCausalLM", ("qkv_proj",), ("qkv_proj", "down_proj"))
_decoder(
    "GPT-2", "GPT2LMHeadModel", ("c_attn",), ("c_attn", "mlp.c_proj"), base=_TOKENS | _SIZES, n_positions=64
)
_decoder(
    "GPT-NeoX", "GPTNeoXForCausalLM", ("query_key_value",), ("query_key_value", "dense_4h_to_h"), "lm_head"
)
_decoder(
    "GPT-J", "GPTJForCausalLM", scaled=("k_proj", "v_proj", "fc_out"), base=_TOKENS,
    n_embd=WIDTH, n_layer=2, n_head=2, rotary_dim=4, n_positions=64,
)  # fmt: skip
_decoder(
    "GPT-Neo", "GPTNeoForCausalLM", scaled=("k_proj", "v_proj", "c_proj"), base=_TOKENS, hidden_size=WIDTH,
    num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=4,
    max_position_embeddings=64,
)  # fmt: skip
_decoder(
    "OPT", "OPTForCausalLM", scaled=("k_proj", "v_proj", "fc2"), ffn_dim=24, word_embed_proj_dim=12,
    base=_TOKENS | _SIZES, max_position_embeddings=64,
)  # fmt: skip
_decoder(
    "BLOOM",
    "BloomForCausalLM",
    ("query_key_value",),
    ("query_key_value", "dense_4h_to_h"),
    base=_TOKENS | _SIZES,
)
_decoder(
    "Falcon", "FalconForCausalLM", ("query_key_value",), ("query_key_value", "dense_4h_to_h"),
    base=_TOKENS | _SIZES, bias=True,
)  # fmt: skip
_decoder(
    "MPT", "MptForCausalLM", ("Wqkv",), ("Wqkv", "ffn.down_proj"), base=_TOKENS, d_model=WIDTH, n_heads=2,
    n_layers=2, max_seq_len=64, expansion_ratio=2,
)  # fmt: skip
_decoder("Cohere", "CohereForCausalLM", logit_scale=0.25)
_decoder("OLMo", "OlmoForCausalLM")
_decoder("OLMo2", "Olmo2ForCausalLM")
_decoder("StableLM", "StableLmForCausalLM", use_qkv_bias=True)
_decoder("Granite", "GraniteForCausalLM", residual_multiplier=0.5, logits_scaling=2.0)
_decoder("StarCoder2", "Starcoder2ForCausalLM", scaled=("k_proj", "v_proj", "c_proj"))


def _encoder(
    name: str, make: str, targets: Any = ("query", "value"), scaled: Any = _BERT_SCALED, **own: Any
) -> None:
    base, head = own.pop("base", _BERT), own.pop("head", "classifier")
    _add(name, "encoder", make, own.pop("batch", "class"), targets, scaled, head, base | own)


_encoder("BERT", "BertForSequenceClassification")
_encoder("RoBERTa", "RobertaForSequenceClassification")
_encoder(
    "DistilBERT", "DistilBertForSequenceClassification", ("q_lin", "v_lin"), ("k_lin", "v_lin", "lin2"),
    base=_TOKENS, dim=WIDTH, n_layers=2, n_heads=2, hidden_dim=24, num_labels=3, max_position_embeddings=64,
)  # fmt: skip
_encoder("ALBERT", "AlbertForSequenceClassification", scaled=("key", "value", "ffn_output"), embedding_size=8)
_encoder("ELECTRA", "ElectraForSequenceClassification", embedding_size=8)
_encoder(
    "DeBERTa-v2", "DebertaV2ForSequenceClassification", ("query_proj", "value_proj"),
    ("key_proj", "value_proj", "output.dense"), relative_attention=True, pos_att_type=["p2c", "c2p"],
    max_relative_positions=8, position_buckets=4, share_att_key=True, past=("rel_embeddings",),
)  # fmt: skip
_encoder("MPNet", "MPNetForSequenceClassification", ("q", "v"), ("k", "v", "output.dense"))
_encoder(
    "XLNet", "XLNetForSequenceClassification", ("layer_1",), ("layer_2",), base=_TOKENS, d_model=WIDTH,
    n_layer=2, n_head=2, d_inner=24, num_labels=3, head="logits_proj",
)  # fmt: skip
_encoder(
    "ModernBERT", "ModernBertForSequenceClassification", ("Wqkv",), ("Wqkv", "mlp.Wo"), local_attention=4
)
_encoder("BERT, masked words", "BertForMaskedLM", head="cls.predictions", batch="words")


def _both(
    name: str, make: str, targets: Any, scaled: Any, base: Any, batch: str = "translation", **own: Any
) -> None:
    family = own.pop("family", "encoder–decoder")
    _add(name, family, make, batch, targets, scaled, own.pop("head", "lm_head"), base | own, generates=True)


_T5 = _TOKENS | {
    "d_model": WIDTH, "d_kv": 5, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0
}  # fmt: skip
_BART_SCALED = _VIT_SCALED = ("k_proj", "v_proj", "fc2")
_both("T5", "T5ForConditionalGeneration", ("q", "v"), ("k", "v", "wo"), _T5)
_both("BART", "BartForConditionalGeneration", _QV, _BART_SCALED, _BART)
_both("mBART", "MBartForConditionalGeneration", _QV, _BART_SCALED, _BART)
_both("Pegasus", "PegasusForConditionalGeneration", _QV, _BART_SCALED, _BART)
_both("Marian", "MarianMTModel", _QV, _BART_SCALED, _BART)
_both(
    "Whisper", "WhisperForConditionalGeneration", _QV, _BART_SCALED, _WHISPER, "spectrogram", head="proj_out",
)  # fmt: skip

_SPACE = {"family": "state space"}
_decoder(
    "Mamba", "MambaForCausalLM", ("in_proj", "out_proj"), ("in_proj", "out_proj"), base=_TOKENS,
    hidden_size=WIDTH, num_hidden_layers=2, state_size=4, past=("conv1d", "dt_proj"), **_SPACE,
)  # fmt: skip
_decoder(
    "Mamba2", "Mamba2ForCausalLM", ("in_proj", "out_proj"), ("in_proj", "out_proj"), base=_TOKENS,
    hidden_size=WIDTH, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=8, n_groups=1, expand=2,
    chunk_size=4, past=("conv1d",), **_SPACE,
)  # fmt: skip
_decoder(
    "Bamba", "BambaForCausalLM", ("q_proj", "v_proj", "in_proj"), ("k_proj", "v_proj", "down_proj"),
    mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=4, mamba_chunk_size=4,
    attn_layer_indices=[1], past=("conv1d",), **_SPACE,
)  # fmt: skip
_decoder(
    "Jamba", "JambaForCausalLM", ("q_proj", "v_proj", "in_proj"), ("k_proj", "v_proj"), mamba_d_state=4,
    mamba_dt_rank=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
    num_experts=2, num_experts_per_tok=1, past=("conv1d", "dt_proj"), **_SPACE,
)  # fmt: skip

_MIXED = {"family": "mixture of experts"}
_decoder(
    "Mixtral",
    "MixtralForCausalLM",
    scaled=("k_proj", "v_proj"),
    num_local_experts=4,
    sliding_window=None,
    **_MIXED,
)
_decoder(
    "Qwen2-MoE", "Qwen2MoeForCausalLM", scaled=("k_proj", "v_proj"), num_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, **_MIXED,
)  # fmt: skip
_both(
    "Switch", "SwitchTransformersForConditionalGeneration", ("q", "v"), ("k", "v", "wo"),
    _T5, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_decoder_layers=2, num_experts=2,
    expert_capacity=16, **_MIXED,
)  # fmt: skip


def _vision(
    name: str, make: str, targets: Any, scaled: Any, batch: str = "pictures", base: Any = _VIT, **own: Any
) -> None:
    _add(name, "vision", make, batch, targets, scaled, own.pop("head", "classifier"), base | own)


_vision("ViT", "ViTForImageClassification", _QV, _VIT_SCALED)
_vision(
    "Swin", "SwinForImageClassification", _QV, _VIT_SCALED, "large pictures", {"num_labels": 3},
    image_size=32, patch_size=4, embed_dim=8, depths=[1, 2], num_heads=[2, 2], window_size=4, mlp_ratio=2.0,
)  # fmt: skip
_vision(
    "ConvNeXt", "ConvNextForImageClassification", ("pwconv1", "pwconv2"), ("pwconv1", "pwconv2"),
    "large pictures", {"num_labels": 3}, hidden_sizes=[8, 16], depths=[1, 2], num_stages=2,
)  # fmt: skip
_vision("BEiT", "BeitForImageClassification", _QV, _VIT_SCALED, use_relative_position_bias=True)
_vision("DINOv2", "Dinov2ForImageClassification", _QV, _VIT_SCALED, mlp_ratio=2)
_vision(
    "ResNet", "ResNetForImageClassification", ("convolution",), ("convolution",), "large pictures",
    {"num_labels": 3}, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic",
)  # fmt: skip


def _speech(
    name: str, make: str, base: Any = _SOUND, batch: str = "sound", scaled: Any = None, **own: Any
) -> None:
    scaled = scaled or ("k_proj", "v_proj", "output_dense")
    _add(name, "speech", make, batch, _QV, scaled, own.pop("head", "classifier"), base | own)


_speech("Wav2Vec2", "Wav2Vec2ForSequenceClassification")
_speech("HuBERT", "HubertForSequenceClassification")
_speech("Whisper, encoder", "WhisperForAudioClassification", _WHISPER, "spectrogram class", _BART_SCALED)


def _vision_language() -> None:
    family = FAMILIES[-1]
    text = _LLAMA
    look = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    look |= {"image_size": 8, "patch_size": 4, "projection_dim": 8}
    _add(
        "LLaVA", family, "LlavaForConditionalGeneration", "picture and words", _QV, _LLAMA_SCALED,
        "lm_head", {}, config=lambda: hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**look), text_config=hf.LlamaConfig(**text),
            image_token_id=IMAGE_TOKEN, image_seq_length=4, vision_feature_layer=-2, pad_token_id=0,
        ),
        generates=True,
    )  # fmt: skip
    _add(
        "PaliGemma", family, "PaliGemmaForConditionalGeneration", "picture before words", _QV, _LLAMA_SCALED,
        "lm_head", {}, config=lambda: hf.PaliGemmaConfig(
            vision_config=hf.SiglipVisionConfig(**look | {"vision_use_head": False}).to_dict(),
            text_config=hf.GemmaConfig(**text, head_dim=8).to_dict(), image_token_id=IMAGE_TOKEN,
            projection_dim=WIDTH, hidden_size=WIDTH, pad_token_id=0,
        ),
        generates=True,
    )  # fmt: skip
    _add(
        "CLIP", family, "CLIPModel", "picture and text", _QV, _VIT_SCALED, "text_projection", {},
        config=lambda: hf.CLIPConfig(
            text_config=_BERT | {"projection_dim": 8}, vision_config=look, projection_dim=8
        ),
    )  # fmt: skip


_vision_language()


# ---- the table


def table(
    marks: Mapping[tuple[str, str], str], columns: tuple[str, ...], known: Mapping[str, list[str]]
) -> str:
    """Markdown, one row an architecture. marks: by architecture and method. known: cells that fail, by the reason."""
    holds, refused = (sum(value == mark for value in marks.values()) for mark in ("✓", "refused"))
    lines = [
        "# Architectures",
        "",
        f"{len(ARCHITECTURES)} architectures of transformers × {len(columns)} ways to adapt them, tiny and with random "
        "weights. Written by `python -m tests.architectures`; tests/test_every_architecture.py says what is checked: "
        "gradients against dense autograd, what is frozen bit for bit, bfloat16, autocast, generation with a cache, "
        "saving, merging, detaching.",
        "",
        f"✓ all of that holds ({holds} cells). refused: a ValueError that says why and what there is, and the model "
        f"is as it was ({refused}). **fails**: the check that is named, and no other ({len(marks) - holds - refused}).",
    ]
    for reason, cells in known.items():
        lines += ["", f"{', '.join(cells)}: {reason}."]
    for family in FAMILIES:
        rows = [name for name, architecture in ARCHITECTURES.items() if architecture.family == family]
        lines += ["", f"## {family[0].upper()}{family[1:]}", "", f"| | {' | '.join(columns)} |"]
        lines += ["|---" * (len(columns) + 1) + "|"]
        lines += [f"| {row} | {' | '.join(marks[row, column] for column in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    from tests.test_every_architecture import NAMES, REPORTED, run

    torch.set_num_threads(1)
    hf.logging.set_verbosity_error()
    marks = {}
    for row in ARCHITECTURES:
        for column in NAMES:
            cell = run(row, column)
            marks[row, column] = cell.mark
            for check, found in cell.problems.items():
                print(f"{row} × {column}, {check}: {found}", flush=True)
    known: dict[str, list[str]] = {}
    for (row, column), failing in REPORTED.items():
        for reason in failing.values():
            known.setdefault(reason, []).append(f"{row} × {column}")
    text = table(marks, NAMES, known)
    print(text)
    (Path(__file__).parent.parent / ".github" / "architectures.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
