"""What the library `adapters` makes of tiny models with adapters, compacters, fusions, MAM and UniPELT, written to a
small file.

It needs an older transformers than the package, so it is run in an environment of its own, and its results are stored:

    python3 -m venv ENV && ENV/bin/pip install torch adapters safetensors
    ENV/bin/python tests/additive/inside/adapters_library.py

The file beside this one has for each model its weights and for each case the adapters, both exact in float32, and in
float64 the last hidden states h and the gradients of Σ h ⊙ w for w = linspace(-1, 1): those of the adapters and of the
fusions, and with Houlsby's and Compacter those of the base's norms, which their authors train too. UniPELT gets no
padding: its gates are means over all places there.
Last written with adapters 1.3.0, transformers 4.57.6, torch 2.13.0.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

FILE = Path(__file__).with_suffix(".safetensors")
WIDTH, BOTTLENECK, PREFIX = 8, 3, 2
PRODUCTS = {"compacter": (2, 2), "compacter-plus-plus": (4, 1)}  # how many of them, and the rank of each
SIZES = {
    "vocab_size": 12, "hidden_size": WIDTH, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip
CONFIGS = {  # of transformers, for both versions
    "bert": SIZES | {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
    "llama": SIZES | {"num_key_value_heads": 1, "pad_token_id": 0},
}
IDS = torch.tensor([[1, 5, 7, 3, 11], [0, 0, 4, 9, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def spread(module: nn.Module, seed: int) -> None:
    """Weights, biases and norms as none of them is by default: an error would hide in zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        norm = parameter.dim() == 1 and parameter.detach().eq(1).all()
        parameter.data.copy_((1 + 0.2 * draw if norm else 0.4 * draw).to(torch.float32))  # exact in both


def model_of(kind: str) -> nn.Module:
    import transformers as hf

    if kind == "bert":
        model = hf.BertModel(hf.BertConfig(**CONFIGS[kind]), add_pooling_layer=False)
    else:
        model = hf.LlamaModel(hf.LlamaConfig(**CONFIGS[kind]))
    spread(model, seed=0)
    return model.double().eval()


def value_of(model: nn.Module, mask: Tensor = MASK, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The last hidden states of the real tokens, and the value whose gradients are compared."""
    hidden = model(input_ids=IDS, attention_mask=mask, **inputs).last_hidden_state[mask.bool()]
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view(hidden.shape)
    return hidden, (hidden * weights).sum()


def is_norm(name: str) -> bool:
    return "norm" in name.lower()


def run(kind: str, config: object, *, fused: bool, norms: bool, mask: Tensor = MASK) -> dict[str, Tensor]:
    """One case, in the library's own names."""
    import adapters
    from adapters.composition import Fuse

    model = model_of(kind)
    base = {name for name, _ in model.named_parameters()}
    adapters.init(model)
    names = ("a", "b") if fused else ("a",)
    for name in names:
        model.add_adapter(name, config=config)
    if fused:
        model.add_adapter_fusion(list(names))
        model.set_active_adapters(Fuse(*names))
    else:
        model.set_active_adapters("a")
    added = {name: p for name, p in model.named_parameters() if name not in base}
    spread(nn.ParameterList(added.values()), seed=1)
    model.double().eval()
    for name, p in model.named_parameters():
        p.requires_grad_(name in added or (norms and is_norm(name)))
    hidden, value = value_of(model, mask)
    value.backward()
    every = dict(model.named_parameters())
    return (
        {"hidden": hidden.detach()}
        | {f"value/{name}": every[name].detach().float() for name in added}
        | {f"grad/{name}": p.grad for name, p in every.items() if p.grad is not None}
    )


def main() -> None:
    import adapters
    import transformers
    from adapters import (
        CompacterConfig,
        CompacterPlusPlusConfig,
        DoubleSeqBnConfig,
        LoRAConfig,
        MAMConfig,
        ParBnConfig,
        PrefixTuningConfig,
        SeqBnConfig,
        UniPELTConfig,
    )
    from safetensors.torch import save_file

    size = {"reduction_factor": WIDTH / BOTTLENECK}
    plain = SeqBnConfig(original_ln_before=False, non_linearity="relu", **size)
    configs = {
        "houlsby": DoubleSeqBnConfig(non_linearity="gelu", **size),
        "pfeiffer": plain,
        "at-norm": SeqBnConfig(non_linearity="relu", **size),
        "parallel": ParBnConfig(non_linearity="silu", scaling=4.0, **size),
    }
    prefix = PrefixTuningConfig(prefix_length=PREFIX, bottleneck_size=5)
    configs["mam"] = MAMConfig(prefix, ParBnConfig(scaling=4.0, **size))
    configs["unipelt"] = UniPELTConfig(prefix, plain.replace(non_linearity="gelu"), LoRAConfig(r=2, alpha=2))
    for name, (n, r) in PRODUCTS.items():
        products = {"phm_dim": n, "phm_rank": r, "reduction_factor": 2, "non_linearity": "gelu"}
        kind = CompacterConfig if name == "compacter" else CompacterPlusPlusConfig
        configs[name] = kind(
            original_ln_before=False, **products
        )  # as the authors', without the norm of before
    tensors = {
        f"{kind}/{name}": p.detach().float()
        for kind in CONFIGS
        for name, p in model_of(kind).named_parameters()
    }
    cases = [("bert", name, False) for name in configs]
    cases += [("llama", "houlsby", False), ("llama", "pfeiffer", False)]
    cases += [(kind, name, False) for kind in CONFIGS for name in PRODUCTS]
    cases += [("bert", "pfeiffer", True), ("bert", "at-norm", True), ("llama", "pfeiffer", True)]
    for kind, name, fused in cases:
        mask = torch.ones_like(MASK) if name == "unipelt" else MASK
        norms = name in ("houlsby", "compacter")
        found = run(kind, configs[name], fused=fused, norms=norms, mask=mask)
        tensors |= {f"{kind}-{'fused-' * fused}{name}/{key}": value for key, value in found.items()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, FILE)
    print(
        f"adapters {adapters.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    )
    print(f"{len(tensors)} tensors, {FILE.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
