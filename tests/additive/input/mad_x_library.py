"""What the library `adapters` makes of tiny language models with MAD-X, written to a small file.

As tests/additive/inside/adapters_library.py, in an environment of its own with an older transformers:

    ENV/bin/python -m tests.additive.input.mad_x_library

A language adapter with its invertible one, and a task adapter stacked on it. The file beside this one has for each
model its weights and the adapters, exact in float32, and in float64 the logits of the real tokens, and the gradients
of Σ logits ⊙ w for w = linspace(-1, 1).
Last written with adapters 1.3.0, transformers 4.57.6, torch 2.13.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.additive.inside.adapters_library import BOTTLENECK, CONFIGS, IDS, MASK, WIDTH, spread

FILE = Path(__file__).with_suffix(".safetensors")
NAMES = ("language", "task")


def model_of(kind: str) -> nn.Module:
    """An encoder whose head is tied to its embeddings, and a decoder with one of its own."""
    import transformers as hf

    if kind == "bert":
        model: nn.Module = hf.BertForMaskedLM(hf.BertConfig(**CONFIGS[kind]))
    else:
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**CONFIGS[kind], tie_word_embeddings=False))
    spread(model, seed=0)
    return model.double().eval()


def value_of(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The logits of the real tokens, and the value whose gradients are compared."""
    logits = model(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)
    return logits, (logits * weights).sum()


def in_the_library(kind: str) -> nn.Module:
    """The same model as the library has it: with the heads of transformers' own classes it inverts nothing."""
    import adapters
    import transformers as hf

    own, config = model_of(kind), CONFIGS[kind]
    if kind == "bert":
        model: Any = adapters.BertAdapterModel(hf.BertConfig(**config))
        model.add_masked_lm_head("words", layers=2, activation_function="gelu")
        parts = {
            "0": own.cls.predictions.transform.dense,
            "2": own.cls.predictions.transform.LayerNorm,
            "3": own.cls.predictions.decoder,
        }
        model.bert.load_state_dict(own.bert.state_dict(), strict=False)  # its pooler is read by nobody
    else:
        model = adapters.LlamaAdapterModel(hf.LlamaConfig(**config, tie_word_embeddings=False))
        model.add_causal_lm_head("words", layers=1)
        parts = {"0": own.lm_head}
        model.model.load_state_dict(own.model.state_dict())
    model = model.double().eval()
    for place, part in parts.items():
        model.heads["words"][int(place)].load_state_dict(
            part.state_dict(), strict=False
        )  # its bias starts at 0
    return model


def run(kind: str) -> dict[str, Tensor]:
    from adapters import SeqBnConfig, SeqBnInvConfig, Stack

    model = in_the_library(kind)
    base = {name for name, _ in model.named_parameters()}
    plain = {"original_ln_before": False, "non_linearity": "relu", "reduction_factor": WIDTH / BOTTLENECK}
    torch.testing.assert_close(value_of(model), value_of(model_of(kind)))
    model.add_adapter("language", config=SeqBnInvConfig(**plain))
    model.add_adapter("task", config=SeqBnConfig(**plain))
    model.set_active_adapters(Stack(*NAMES))
    added = {name: p for name, p in model.named_parameters() if name not in base}
    spread(nn.ParameterList(added.values()), seed=1)
    model.double().eval()
    for name, p in model.named_parameters():
        p.requires_grad_(name in added)
    logits, value = value_of(model)
    value.backward()
    found = {"logits": logits.detach()}
    for name, p in added.items():
        found |= {f"value/{name}": p.detach().float(), f"grad/{name}": p.grad}
    return found


def main() -> None:
    import adapters
    import transformers
    from safetensors.torch import save_file

    tensors = {}
    for kind in CONFIGS:
        tensors |= {f"{kind}/base/{n}": p.detach().float() for n, p in model_of(kind).named_parameters()}
        tensors |= {f"{kind}/{key}": value for key, value in run(kind).items()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, FILE)
    print(
        f"adapters {adapters.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    )
    print(f"{len(tensors)} tensors, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
