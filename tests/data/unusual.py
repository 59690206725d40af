"""Models in which a label means something else than in a Llama, small and drawn from fixed seeds."""

from typing import Any

import torch
import transformers as hf
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.tiny import llama

DECODER: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": 50, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
PICTURE = 40  # the token that stands for a piece of a picture
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip


def lively(model: Any) -> Any:
    """With weights so large that wrong positions show, in evaluation mode."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(8)
    return model.eval()


def decoder(name: str = "Llama", **settings: Any) -> Any:
    """A causal language model by its family's name, such as "Gemma2"."""
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**(DECODER | settings))
    return lively(getattr(hf, f"{name}ForCausalLM")(config))


def bart(kind: str = "ForCausalLM", **settings: Any) -> Any:
    """Its causal form compares position t with label t; BartFor…"""
    torch.manual_seed(0)
    return lively(getattr(hf, f"Bart{kind}")(hf.BartConfig(**(BART | settings))))


def t5() -> Any:
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config).eval()


def bamba(**settings: Any) -> Any:
    """State-space layers, and a loss with a term for the size of the logits."""
    return decoder(
        "Bamba", attn_layer_indices=[1], mamba_d_state=8, mamba_n_heads=4, mamba_d_head=8, mamba_chunk_size=8,
        z_loss_coefficient=0.1, **settings,
    )  # fmt: skip


def gemma_with_pictures() -> Any:
    """A vision–language model: its name says nothing of a causal language model, and it shifts its labels."""
    torch.manual_seed(0)
    config = hf.Gemma3Config(
        text_config={**DECODER, "sliding_window": 8},
        vision_config=VISION | {"vision_use_head": False}, mm_tokens_per_image=4, image_token_index=PICTURE,
        boi_token_index=41, eoi_token_index=42,
    )  # fmt: skip
    return lively(hf.Gemma3ForConditionalGeneration(config))


def llava() -> Any:
    torch.manual_seed(0)
    text, vision = hf.LlamaConfig(**DECODER), hf.CLIPVisionConfig(**VISION, projection_dim=16)
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=PICTURE,
        vision_feature_select_strategy="default",
    )
    return lively(hf.LlavaForConditionalGeneration(config))


def whisper() -> Any:
    """Hears instead of reading: there are no token embeddings to try it with, and it needs its sounds."""
    torch.manual_seed(0)
    config = hf.WhisperConfig(
        **BART | {"max_source_positions": 10, "max_target_positions": 20, "num_mel_bins": 4}
    )
    return lively(hf.WhisperForConditionalGeneration(config))


def speech_ctc() -> Any:
    """Compares whole sequences: there are more positions than labels."""
    torch.manual_seed(0)
    config = hf.Wav2Vec2Config(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, feat_extract_norm="layer",
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, pad_token_id=0, ctc_zero_infinity=True,
    )  # fmt: skip
    return hf.Wav2Vec2ForCTC(config).eval()


def xlm() -> Any:
    """Its name ends like GPT-2's, whose labels are shifted."""
    torch.manual_seed(0)
    config = hf.XLMConfig(
        vocab_size=50, emb_dim=16, n_layers=2, n_heads=2, max_position_embeddings=64, n_langs=1
    )
    return lively(hf.XLMWithLMHeadModel(config))


class SmoothedLlama(hf.LlamaForCausalLM):
    """Label smoothing, and a term of its own: no plain cross-entropy, shifted all the same."""

    def forward(self, input_ids: Tensor | None = None, labels: Tensor | None = None, **more: Any) -> Any:  # type: ignore[override]
        output = super().forward(input_ids=input_ids, **more)
        if labels is not None:
            logits, after = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            output.loss = cross_entropy(logits, after, label_smoothing=0.3) + 0.1 * logits.square().mean()
        return output


def smoothed() -> Any:
    torch.manual_seed(0)
    return lively(SmoothedLlama(hf.LlamaConfig(**DECODER)))


def speaker(family: str) -> Any:
    """A lively causal language model over the words of `tests.tiny.tokenizer`."""
    n = 320
    if family == "llama":
        return llama(initializer_range=0.3)
    if family == "bart":  # counts its positions itself
        return bart(vocab_size=n)
    torch.manual_seed(0)
    if family == "gpt2":
        config = hf.GPT2Config(
            n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=n, initializer_range=0.3
        )
        return hf.GPT2LMHeadModel(config).eval()
    if family == "bloom":  # positions are distances
        return lively(hf.BloomForCausalLM(hf.BloomConfig(vocab_size=n, hidden_size=16, n_layer=2, n_head=2)))
    if family == "mamba":  # a state in the place of keys and values
        return lively(hf.MambaForCausalLM(hf.MambaConfig(vocab_size=n, hidden_size=16, num_hidden_layers=2)))
    return bamba(vocab_size=n)  # both


def words(rows: int = 3, length: int = 7, *, prompt: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """A batch of texts of one length, the first tokens without labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 39, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def examples_of(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The rows of a batch."""
    return [{key: value[i] for key, value in batch.items()} for i in range(len(batch["labels"]))]
