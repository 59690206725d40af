"""Tiny models of the usual architectures, built from configurations with fixed seeds: nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from torch import Tensor, nn

VOCABULARY = 97
KINDS = ("llama", "gpt2", "bert", "t5", "vit")
TARGETS = {
    "llama": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
    "bert": ("query", "value"),
    "t5": ("q", "v"),
    "vit": ("q_proj", "v_proj"),
}


def tiny_model(
    kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: object
) -> nn.Module:
    """A model of the given architecture in evaluation mode, with non-square weights and without dropout."""
    import transformers as hf

    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    usual = {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    usual |= {"num_attention_heads": 4, **ids}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    classes = {
        "llama": (
            hf.LlamaForCausalLM,
            hf.LlamaConfig,
            usual | {"num_key_value_heads": 2, "attention_bias": True},
        ),
        "gpt2": (
            hf.GPT2LMHeadModel,
            hf.GPT2Config,
            {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32, **ids}
            | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        ),
        "bert": (
            hf.BertForSequenceClassification,
            hf.BertConfig,
            usual | off | {"max_position_embeddings": 32, "num_labels": 3},
        ),
        "t5": (
            hf.T5ForConditionalGeneration,
            hf.T5Config,
            {
                "vocab_size": VOCABULARY,
                "d_model": 24,
                "d_kv": 5,
                "d_ff": 40,
                "num_layers": 2,
                "num_heads": 4,
                **ids,
            }
            | {"dropout_rate": 0.0, "decoder_start_token_id": 0},
        ),
        "vit": (
            hf.ViTForImageClassification,
            hf.ViTConfig,
            {
                k: usual[k]
                for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
            }
            | off
            | {"image_size": 8, "patch_size": 4, "num_labels": 3},
        ),
    }
    model_class, config_class, settings = classes[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**(settings | overrides)))
        for (
            parameter
        ) in model.parameters():  # biases start at zero and weights tiny: an error would hide there
            values = parameter.data
            if values.dim() == 1:
                values.copy_(values.mean().round() + 0.1 * torch.randn_like(values))
            else:
                values.mul_(0.25 / values.std())
    return model.to(dtype).eval()


def tiny_batch(kind: str, *, side: str = "right", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Three examples with labels: sentences of 9, 6 and 4 tokens padded on one side, or three pictures."""
    g = torch.Generator().manual_seed(7)
    if kind == "vit":
        return {
            "pixel_values": torch.randn(3, 3, 8, 8, generator=g, dtype=torch.float64).to(dtype),
            "labels": torch.tensor([0, 2, 1]),
        }
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=g)
    places = torch.arange(9).expand(3, 9)
    lengths = torch.tensor([[9], [6], [4]])
    mask = (places < lengths) if side == "right" else (places >= 9 - lengths)
    ids = ids * mask  # pad is 0
    labels = torch.tensor([0, 2, 1]) if kind == "bert" else ids.masked_fill(~mask, -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def redraw_factors(model: nn.Module, seed: int = 1, std: float = 0.2) -> nn.Module:
    """Non-zero values for everything that trains, as after some training: with B = 0 half the errors don't show."""
    g = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            draw = torch.randn(parameter.shape, generator=g, dtype=torch.float64) * std
            parameter.data.copy_(draw)
    return model


@pytest.fixture
def tiny() -> Callable[..., nn.Module]:
    """`tiny(kind, seed=0, dtype=torch.float32, **config)`: see `tiny_model`."""
    return tiny_model


@pytest.fixture
def batch() -> Callable[..., dict[str, Tensor]]:
    """`batch(kind, side="right", dtype=torch.float32)`: see `tiny_batch`."""
    return tiny_batch


@pytest.fixture
def redraw() -> Callable[..., nn.Module]:
    """`redraw(model, seed=1, std=0.2)`: see `redraw_factors`."""
    return redraw_factors


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Every architecture in turn."""
    return request.param


@pytest.fixture
def targets(kind: str) -> tuple[str, ...]:
    """What is usually adapted in a model of this kind."""
    return TARGETS[kind]


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, until the test's end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def threads(request: pytest.FixtureRequest, set_threads: Callable[[int], None]) -> int:
    """Set torch's number of threads for a test: pytest.mark.parametrize("threads", [1, 3], indirect=True)."""
    set_threads(request.param)
    return request.param
