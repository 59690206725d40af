"""How each method is made and attached on each architecture, what then trains, and what it can't do.

CASES has one line a method and CANNOT one line for each thing that a method refuses: the only places that
tests/test_every_method.py looks at. A new method needs its line in CASES, and none elsewhere.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pefttutor as pt
from tests.pictures import picture, tensors
from tests.tiny import KINDS, TARGETS, rows_of, tiny_batch, tiny_model

ARCHITECTURES = (*KINDS, "net")  # "net" is a bare nn.Module
TEXTS = ("llama", "gpt2", "bert", "t5")
DECODERS = ("llama", "gpt2")
WRITERS = ("llama", "gpt2", "t5")

BLOCKS = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "bert": "bert.encoder.layer",
    "t5": "decoder.block",
    "vit": "vit.layers",
    "net": "blocks",
}
HEADS = (
    dict.fromkeys(DECODERS, "lm_head")
    | {"t5": "lm_head"}
    | dict.fromkeys(("bert", "vit", "net"), "classifier")
)
HEAD_WEIGHTS = {  # a head tied to the embeddings is known by their name
    "llama": ("lm_head.weight",),
    "gpt2": ("transformer.wte.weight",),
    "t5": ("shared.weight",),
} | dict.fromkeys(("bert", "vit", "net"), ("classifier.weight", "classifier.bias"))
TABLES = {
    "llama": ("model.embed_tokens.weight",),
    "gpt2": ("transformer.wte.weight", "transformer.wpe.weight"),
    "bert": tuple(f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")),
    "t5": (
        "shared.weight",
        *(f"{x}coder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for x in ("en", "de")),
    ),
    "vit": (),
    "net": (),
}  # fmt: skip
NORMS = {
    "llama": r"norm\.", "gpt2": r"\.ln_.\.", "bert": r"LayerNorm\.", "t5": r"layer_norm\.", "vit": r"layernorm",
    "net": r"\.norm\.",
}  # fmt: skip
READERS = {
    "llama": "model",
    "gpt2": "transformer",
    "bert": "bert",
    "t5": "encoder",
}  # what reads a text's tokens
PREFIXED = {
    "llama": ("model", 2 * 6),
    "gpt2": ("transformer", 24),
    "bert": ("bert", 24),
    "t5": ("decoder", 4 * 5),
}
KEYS_AND_FED = {  # IA3's targets, and those whose input is scaled
    "llama": (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "gpt2": (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
    "bert": (("key", "value", "output.dense"), ("output.dense",)),
    "t5": (("k", "v", "wo"), ("wo",)),
    "vit": (("k_proj", "v_proj", "fc2"), ("fc2",)),
    "net": (("up", "down"), ("down",)),
}
ENDS = {  # of the sublayers: what an adapter is put after
    "llama": ("o_proj", "down_proj"),
    "gpt2": ("c_proj",),
    "bert": ("output.dense",),
    "t5": ("o", "wo"),
    "vit": ("o_proj", "fc2"),
    "net": ("down",),
}
MASKED = TARGETS | {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "c_fc"), "bert": ("query", "dense")}
# Factors as even as can be, the largest in the middle.
THREE = {8: (2, 2, 2), 24: (2, 4, 3), 40: (2, 5, 4), 72: (3, 6, 4)}
THREE |= {12: (2, 3, 2), 20: (2, 5, 2), 48: (3, 4, 4)}
SPECIAL = (
    1,
    2,
)  # the ids of special tokens, and where the batches have them: at the start, and within one text

# ---- what trains, by the closed formulas


def sizes(model: nn.Module, chosen: Callable[[str], bool] = lambda name: True) -> dict[str, int]:
    """How many values each of the model's parameters has whose name is chosen."""
    return {name: p.numel() for name, p in model.named_parameters() if chosen(name)}


def layers(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """In and out of every layer whose name is, or ends in, one of `names`."""
    ends = tuple(f".{name}" for name in names)
    shapes = {n: (m, tuple(m.weight.shape)) for n, m in model.named_modules() if f".{n}".endswith(ends)}
    return {n: shape if type(m).__name__ == "Conv1D" else shape[::-1] for n, (m, shape) in shapes.items()}


def of_lora(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    found = layers(base, TARGETS[kind]).items()
    return {f"{n}.lora_{x}": method.r * size for n, (i, o) in found for x, size in (("A", i), ("B", o))}


def of_adalora(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    found, r = layers(base, TARGETS[kind]).items(), method.init_r
    return {f"{n}.lora_{x}": r * size for n, (i, o) in found for x, size in (("A", i), ("B", o), ("E", 1))}


def of_increlora(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    return of_adalora(kind, base, replace(method, init_r=2))


def of_dora(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    found = layers(base, TARGETS[kind]).items()
    return of_lora(kind, base, method) | {f"{n}.lora_magnitude_vector": o for n, (_, o) in found}


def of_lora_fa(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    return {name: size for name, size in of_lora(kind, base, method).items() if name.endswith("lora_B")}


def of_sltrain(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    found = layers(base, TARGETS[kind]).items()
    entries = {f"{n}.sltrain_values": int(method.density * i * o) for n, (i, o) in found}
    return of_lora(kind, base, method) | entries


def of_loha(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    found = layers(base, TARGETS[kind]).items()
    return {
        f"{n}.hada_w{i}_{x}": method.r * size
        for n, (w, o) in found
        for i in (1, 2)
        for x, size in (("a", o), ("b", w))
    }


def of_lokr(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    """W₁ whole and W₂ of rank 1, but for layers that are too small for it."""
    trains = {}
    for n, (i, o) in layers(base, TARGETS[kind]).items():
        rows, columns = (max(d for d in range(1, 9) if size % d == 0 and d * d <= size) for size in (o, i))
        trains[f"{n}.lokr_w1"] = rows * columns
        trains |= {f"{n}.lokr_w2_a": o // rows, f"{n}.lokr_w2_b": i // columns}
    return trains


def of_sora(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    return of_lora(kind, base, method) | {f"{n}.lora_gate": method.r for n in layers(base, TARGETS[kind])}


def of_lotr(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    found = layers(base, TARGETS[kind])
    shared = {
        f"lotr_{x}_{o}x{i}": method.r * size for i, o in found.values() for x, size in (("L", o), ("R", i))
    }
    return shared | {f"{n}.lotr_M": method.r**2 for n in found}


def of_melora(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    return {name.replace("lora", "melora"): size for name, size in of_lora(kind, base, method).items()}


def of_mora(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    """√(2 (in + out)) to the nearest whole number, and down to an even one, squared."""
    found = layers(base, TARGETS[kind]).items()
    return {f"{n}.mora_M": (int((2 * (i + o)) ** 0.5 + 0.5) // 2 * 2) ** 2 for n, (i, o) in found}


def of_mpo(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    """With bonds of 2 a tensor at an end has twice as many values as there are pairs of its rows and columns."""
    trains = {}
    for n, (i, o) in layers(base, TARGETS[kind]).items():
        (first_o, _, last_o), (first_i, _, last_i) = THREE[o], THREE[i]
        trains |= {f"{n}.mpo_0": 2 * first_o * first_i, f"{n}.mpo_2": 2 * last_o * last_i}
    return trains


def of_vera(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    found = layers(base, TARGETS[kind]).items()
    return {f"{n}.vera_lambda_{x}": size for n, (_, o) in found for x, size in (("b", o), ("d", method.r))}


def of_ia3(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    targets, fed = KEYS_AND_FED[kind]
    on_input = layers(base, fed)
    return {f"{n}.ia3_l": i if n in on_input else o for n, (i, o) in layers(base, targets).items()}


def of_adapter(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    m, widths = method.bottleneck, {n: out for n, (_, out) in layers(base, ENDS[kind]).items()}
    sizes = {"down": lambda d: m * d, "down_bias": lambda d: m, "up": lambda d: m * d, "up_bias": lambda d: d}
    return {f"{n}.adapter_{key}": size(d) for n, d in widths.items() for key, size in sizes.items()}


def of_ciat(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    """An adapter beside each self-attention and feed-forward, and one with a norm over what goes into each stack."""
    beside = {n: size for n, size in of_adapter(kind, base, method).items() if "EncDecAttention" not in n}
    m, over = method.embedding_bottleneck, {}
    # Of an encoder with one block alone its two sublayers are the list that is found.
    firsts = ("encoder.block.0.layer.0", "decoder.block.0") if kind == "t5" else (f"{BLOCKS[kind]}.0",)
    for first in firsts:
        d = base.get_input_embeddings().weight.shape[1]
        sizes = {"norm": d, "norm_bias": d, "down": m * d, "down_bias": m, "up": m * d, "up_bias": d}
        over |= {f"{first}.embedding_{key}": size for key, size in sizes.items()}
    return beside | over


def of_adamix(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    """At the end of each feed-forward the down-projections of all experts, and one up-projection."""
    ends = {n: size for n, size in of_adapter(kind, base, method).items() if is_feed_forward(n)}
    return {
        n.replace("adapter_", "adamix_"): size * (method.experts if "_down" in n else 1)
        for n, size in ends.items()
        if f".{ENDS[kind][-1]}." in n
    }


def of_sparse_adapter(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    """As many weights as the share says, in whatever matrices they are, and all biases."""
    model = attached_to("SparseAdapter", kind)
    found = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    dense = {n: size for n, size in of_adapter(kind, base, method).items() if is_feed_forward(n)}
    dense = {n.replace("adapter", "sparse"): size for n, size in dense.items() if f".{ENDS[kind][-1]}." in n}
    biases = {n: size for n, size in dense.items() if n.endswith("bias")}
    kept = {n: size for n, size in found.items() if n.endswith("_kept")}
    assert {n.removesuffix("_kept") for n in kept} == dense.keys() - biases.keys()
    assert sum(kept.values()) == int(
        method.fraction * sum(dense.values()) - method.fraction * sum(biases.values())
    )
    return kept | biases


def of_adapter_bias(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    """w and v of the layer that ends each feed-forward, and b where that has a bias."""
    biased = {n.removesuffix(".bias") for n, _ in base.named_parameters() if n.endswith(".bias")}
    ends = {n: shape for n, shape in layers(base, ENDS[kind][-1:]).items() if is_feed_forward(n)}
    return {
        f"{n}.adapterbias_{key}": size
        for n, (i, o) in ends.items()
        for key, size in {"w": i, "v": o, "b": 1}.items()
        if key != "b" or n in biased
    }


def of_llama_adapter(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    """In each layer as many prompts as wide as the model, and one gate."""
    found = layers(base, ("o_proj",))
    return {
        f"{n}.adaption_{key}": size
        for n, (_, o) in found.items()
        for key, size in (("prompt", method.adapter_len * o), ("gate", 1))
    }


def of_lst(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    """Of every block and of the norm after them all sizes divided by r; a D, and of each block a gate; and one U."""
    around, r, found = BLOCKS[kind].rpartition(".")[0], method.reduction, {}
    after = {"llama": "norm", "gpt2": "ln_f", "vit": "layernorm"}.get(kind, "none")
    for name, p in base.named_parameters():
        if name.startswith((f"{BLOCKS[kind]}.", f"{around}.{after}.")):
            place = ".".join(
                name.split(".")[: len(BLOCKS[kind].split(".")) + 1 if BLOCKS[kind] in name else -2]
            )
            own = name.removeprefix(f"{place}.").replace(".", "_")
            found[f"{place}.lst_{own}"] = math.prod(n // r for n in p.shape)
    downs = [f"{around}.lst_first", *(f"{BLOCKS[kind]}.{i}.lst_read" for i in (0, 1))]
    found |= {f"{down}_{key}": size for down in downs for key, size in (("weight", 8 * 24), ("bias", 8))}
    found |= {f"{around}.lst_up_weight": 24 * 8, f"{around}.lst_up_bias": 24}
    return found | {f"{BLOCKS[kind]}.{i}.lst_gate": 1 for i in (0, 1)}


def of_compacter(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    """In the model one A, and in each layer S and T of both matrices, and two biases."""
    found, m = {"compacter_A": method.n**3}, method.bottleneck
    for path, (_, d) in layers(base, ENDS[kind]).items():
        for which, rows, columns in (("down", d, m), ("up", m, d)):
            found |= {
                f"{path}.compacter_{which}_{key}": size
                for key, size in (("S", method.r * rows), ("T", method.r * columns), ("bias", columns))
            }
    return found


def of_invertible(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    """In the first block two networks, each from half the width, 12, to a quarter, 6, and back."""
    # Of an encoder with one block alone its two sublayers are the list that is found.
    first = "encoder.block.0.layer.0" if kind == "t5" else f"{BLOCKS[kind]}.0"
    each = {"down": 6 * 12, "down_bias": 6, "up": 12 * 6, "up_bias": 12}
    return {f"{first}.invertible_{x}_{key}": size for x in "FG" for key, size in each.items()}


def of_mam(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    """A prefix, and an adapter at the end of each feed-forward."""
    prefix = {f"{PREFIXED[kind][0]}.prefix": 3 * 4 * PREFIXED[kind][1]}
    ends = {n: size for n, size in of_adapter(kind, base, method).items() if is_feed_forward(n)}
    return prefix | {n: size for n, size in ends.items() if f".{ENDS[kind][-1]}." in n}


def of_unipelt(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    """The adapter of each feed-forward's end and LoRA, with a gate each; and a BERT's prefix, with two more."""
    ends = {n: size for n, size in of_adapter(kind, base, method).items() if is_feed_forward(n)}
    found = {n: size for n, size in ends.items() if f".{ENDS[kind][-1]}." in n}
    for name in [n for n in found if n.endswith("adapter_up_bias")]:
        gate = name.replace("up_bias", "gate")
        found |= {f"{gate}_weight": found[name], f"{gate}_bias": 1}
    for name, (i, o) in layers(base, method.lora_modules).items():
        found |= {f"{name}.lora_{x}": method.r * size for x, size in (("A", i), ("B", o))}
        found |= {f"{name}.lora_gate_weight": i, f"{name}.lora_gate_bias": 1}
    if method.num_virtual_tokens:
        found[f"{PREFIXED[kind][0]}.prefix"] = 3 * 4 * PREFIXED[kind][1]
        gates = {f"{BLOCKS[kind]}.{i}.attention.self.prefix_gate" for i in (0, 1)}
        found |= {f"{gate}_{key}": size for gate in gates for key, size in (("weight", 24), ("bias", 1))}
    return found


def is_feed_forward(name: str) -> bool:
    return "attention" not in name and "attn" not in name


def of_fusion(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    widths = {n: out for n, (_, out) in layers(base, ENDS[kind]).items()}
    square = {f"{n}.fusion_{key}": d * d for n, d in widths.items() for key in ("query", "key", "value")}
    return square | {f"{n}.fusion_query_bias": d for n, d in widths.items()}


def of_ssf(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    """Of all that has a weight, but for tables, statistics and the head: what it gives, twice where it has a bias."""
    found = {}
    for name, module in base.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or name == "lm_head" or isinstance(module, (nn.Embedding, nn.BatchNorm1d)):
            continue
        out = weight.shape[-1] if type(module).__name__ == "Conv1D" else len(weight)
        found |= {
            f"{name}.ssf_{key}": out
            for key in ("scale", "shift")[: 1 + ("bias" in dict(module.named_parameters()))]
        }
    return found


def of_diff_pruning(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    every = sizes(base)
    added = {f"{n}_{x}": size for n, size in every.items() for x in ("delta", "alpha")}
    return added | {f"{n}_group": 1 for n in every}


def of_masking(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    return {f"{n}.weight_scores": i * o for n, (i, o) in layers(base, MASKED[kind]).items()}


def of_pasta(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    return {f"{BLOCKS[kind]}.{i}.special": method.num_special * 24 for i in (0, 1)}


def of_prompt(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    return {f"{READERS[kind]}.prompt": method.num_virtual_tokens * 24}


def of_ptuning(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    """A table of 3 rows, two layers of an LSTM with 5 states in each direction, and two linear layers."""
    layers = {
        "table": 3 * 24,
        "head_0_weight": 10 * 10,
        "head_0_bias": 10,
        "head_2_weight": 10 * 24,
        "head_2_bias": 24,
    }
    for layer, width in (("l0", 24), ("l1", 10)):
        for way in ("", "_reverse"):
            layers |= {f"lstm_weight_ih_{layer}{way}": 20 * width, f"lstm_weight_hh_{layer}{way}": 20 * 5}
            layers |= {f"lstm_bias_{x}_{layer}{way}": 20 for x in ("ih", "hh")}
    return {f"{READERS[kind]}.ptuning_{name}": size for name, size in layers.items()}


def of_prefix(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    """In both layers a key and a value for each virtual token, of so many heads times their width."""
    body, both = PREFIXED[kind]
    table = {"table": 3 * 24, "0_weight": 5 * 24, "0_bias": 5, "2_weight": 5 * 4 * both, "2_bias": 4 * both}
    return {f"{body}.prefix_{name}": size for name, size in table.items()}


def everything(kind: str, base: nn.Module, method: Any) -> dict[str, int]:
    return sizes(base)


def share(of: str) -> Callable[[str, nn.Module, Any], int]:
    """How many entries train that are chosen: the rounded-down share `of` (a field) of all."""
    return lambda kind, base, method: int(getattr(method, of) * sum(sizes(base).values()))


# ---- what a method has to look at


def nothing(kind: str, base: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), {}


def examples(kind: str, base: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    how = {"collate": stacked, "log_likelihood": log_likelihood} if kind == "net" else {}
    return (rows_of(batch_of(kind, dtype=next(base.parameters()).dtype))[:1],), how


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def log_likelihood(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"]).log_softmax(-1).gather(1, batch["labels"][:, None])[:, 0]


def every_third(kind: str, base: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Masks of the first, fourth, seventh … entry of the first, fourth, seventh … parameter."""
    chosen = list(base.named_parameters())[::3]
    return ({n: torch.arange(p.numel()).remainder(3).eq(0).view(p.shape) for n, p in chosen},), {}


def two_others(kind: str, base: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An expert and an anti-expert, of another size than the base and with its vocabulary."""
    dtype = next(base.parameters()).dtype
    return tuple(
        tiny_model(kind, seed=seed, dtype=dtype, width=16) for seed in (5, 6)
    ) if kind in DECODERS else (), {}


# ---- what a model must carry before


def as_it_is(kind: str, model: nn.Module) -> nn.Module:
    return model


def two_adapters(kind: str, model: nn.Module) -> nn.Module:
    """Adapters "a" and "b" that have learned something, switched off."""
    for seed, name in enumerate("ab"):
        adapter(kind).attach(model, name=name)
        moved(pt.switch(model, name), seed)
    return pt.switch(model)


def two_plugins(kind: str, model: nn.Module) -> nn.Module:
    """LoRAs "a" and "b" that have learned something, switched off."""
    for seed, name in enumerate("ab"):
        pt.LoRA(r=2, lora_alpha=3, target_modules=TARGETS[kind]).attach(model, name=name)
        moved(pt.switch(model, name), seed)
    return pt.switch(model)


# ---- one line a method


@dataclass(frozen=True)
class Case:
    """How a method is made for an architecture; the sizes of what then trains, by name, or how many entries it
    chooses; what `attach` gets beside the model; and what the model must carry before."""

    make: Callable[[str], Any]
    trains: Callable[[str, nn.Module, Any], dict[str, int] | int]
    sources: Callable[[str, nn.Module], tuple[tuple[Any, ...], dict[str, Any]]] = nothing
    before: Callable[[str, nn.Module], nn.Module] = as_it_is


def ia3(kind: str) -> Any:
    targets, fed = KEYS_AND_FED[kind]
    return pt.IA3(target_modules=targets, feedforward_modules=fed)


def adapter(kind: str) -> Any:
    """A bare module can't be tried, so it is told where."""
    return pt.Adapter(bottleneck=3, scaling=2.0, target_modules=ENDS[kind] if kind == "net" else None)


def unipelt(kind: str) -> Any:
    """A prefix for BERT; what writes has gates for each token, and none."""
    lora, ends = (("up",), ("down",)) if kind == "net" else (TARGETS[kind], None)
    how = {"bottleneck": 3, "activation": "gelu", "adapter_modules": ends, "r": 2, "lora_modules": lora}
    gate = "token" if kind in WRITERS else "text"
    return pt.UniPELT(num_virtual_tokens=3 * (kind == "bert"), gate=gate, **how)


CASES = {
    "AdaLoRA": Case(  # of a layer that lost all its ranks one couldn't see whether it has trained
        lambda kind: pt.AdaLoRA(init_r=2, target_r=2, total_step=2, target_modules=TARGETS[kind]), of_adalora
    ),
    "AdaMix": Case(
        lambda kind: pt.AdaMix(bottleneck=3, experts=3, target_modules=ENDS[kind] if kind == "net" else None), of_adamix
    ),
    "Adapter": Case(adapter, of_adapter),
    "AdapterBias": Case(
        lambda kind: pt.AdapterBias(target_modules=ENDS[kind] if kind == "net" else None), of_adapter_bias
    ),
    "AdapterFusion": Case(
        lambda kind: pt.AdapterFusion(adapters=("a", "b")), of_fusion, before=two_adapters
    ),
    "AutoFreeze": Case(lambda kind: pt.AutoFreeze(), everything),
    "BitFit": Case(lambda kind: pt.BitFit(), lambda kind, base, _: sizes(base, lambda n: n.endswith("bias"))),
    "CIAT": Case(lambda kind: pt.CIAT(bottleneck=3, embedding_bottleneck=2), of_ciat),
    "COLA": Case(  # without a merge, as ReLoRA
        lambda kind: pt.COLA(r=2, lora_alpha=3, link_steps=100, target_modules=TARGETS[kind]), of_lora
    ),
    "ChildTuningD": Case(lambda kind: pt.ChildTuningD(p_D=0.1), share("p_D"), examples),
    "ChildTuningF": Case(lambda kind: pt.ChildTuningF(p_F=0.5), everything),
    "Compacter": Case(
        lambda kind: pt.Compacter(
            bottleneck=4, n=2, r=2, init_std=0.5, target_modules=ENDS[kind] if kind == "net" else None
        ),
        of_compacter,
    ),
    "DeltaLoRA": Case(
        lambda kind: pt.DeltaLoRA(r=2, lora_alpha=3, start_steps=1, target_modules=TARGETS[kind]), of_lora
    ),
    "DiffPruning": Case(lambda kind: pt.DiffPruning(), of_diff_pruning),
    "DoRA": Case(lambda kind: pt.DoRA(r=2, lora_alpha=3, target_modules=TARGETS[kind]), of_dora),
    "DyLoRA": Case(lambda kind: pt.DyLoRA(r=2, lora_alpha=3, target_modules=TARGETS[kind]), of_lora),
    "DynamicDoRA": Case(
        lambda kind: pt.DynamicDoRA(init_r=2, target_r=2, total_step=2, target_modules=TARGETS[kind]), of_adalora
    ),
    "FishDip": Case(lambda kind: pt.FishDip(fraction=0.1), share("fraction"), examples),
    "FishMask": Case(lambda kind: pt.FishMask(fraction=0.1), share("fraction"), examples),
    "IA3": Case(ia3, of_ia3),
    "IncreLoRA": Case(  # all layers get their second triplet after the second step
        lambda kind: pt.IncreLoRA(target_r=2, max_r=2, incre_interval=1, top_h=99, target_modules=TARGETS[kind]),
        of_increlora,
    ),
    "InvertibleAdapter": Case(lambda kind: pt.InvertibleAdapter(), of_invertible),
    "LLaMAAdapter": Case(lambda kind: pt.LLaMAAdapter(adapter_len=3), of_llama_adapter),
    "LST": Case(lambda kind: pt.LST(reduction=3), of_lst),
    "LTSFT": Case(lambda kind: pt.LTSFT(l1_weight=0.1), everything),
    "LastLayers": Case(
        lambda kind: pt.LastLayers(fraction=0.5),
        lambda kind, base, _: sizes(base, lambda n: n.startswith(f"{BLOCKS[kind]}.1.")),
    ),
    "LayerNormTuning": Case(
        lambda kind: pt.LayerNormTuning(), lambda kind, base, _: sizes(base, lambda n: bool(re.search(NORMS[kind], n)))
    ),
    "LinearProbe": Case(
        lambda kind: pt.LinearProbe(modules_to_save=(HEADS[kind],)),
        lambda kind, base, _: sizes(base, lambda n: n in HEAD_WEIGHTS[kind]),
    ),
    "LoHa": Case(lambda kind: pt.LoHa(r=2, alpha=3, target_modules=TARGETS[kind]), of_loha),
    "LoKr": Case(lambda kind: pt.LoKr(r=1, alpha=1.5, target_modules=TARGETS[kind]), of_lokr),
    "LoRA": Case(lambda kind: pt.LoRA(r=2, lora_alpha=3, target_modules=TARGETS[kind]), of_lora),
    "LoRAFA": Case(lambda kind: pt.LoRAFA(r=2, lora_alpha=3, target_modules=TARGETS[kind]), of_lora_fa),
    "LoRAHub": Case(  # of factors that are added up the gradient starts at 0
        lambda kind: pt.LoRAHub(plugins=("a", "b"), combine="deltas"),
        lambda kind, base, method: {"lorahub_weights": 2},
        before=two_plugins,
    ),
    "LoRAPlus": Case(lambda kind: pt.LoRAPlus(r=2, lora_alpha=3, target_modules=TARGETS[kind]), of_lora),
    "LoTR": Case(lambda kind: pt.LoTR(r=2, lora_alpha=3, target_modules=TARGETS[kind]), of_lotr),
    "MAM": Case(lambda kind: pt.MAM(num_virtual_tokens=3, bottleneck=3, scaling=2.0, activation="gelu"), of_mam),
    "MELoRA": Case(lambda kind: pt.MELoRA(r=2, n=2, lora_alpha=3, target_modules=TARGETS[kind]), of_melora),
    "MPO": Case(lambda kind: pt.MPO(bond_dim=2, target_modules=TARGETS[kind]), of_mpo),
    "Masking": Case(lambda kind: pt.Masking(target_modules=MASKED[kind]), of_masking),
    "MiLoRA": Case(lambda kind: pt.MiLoRA(r=2, lora_alpha=3, target_modules=TARGETS[kind]), of_lora),
    "MoRA": Case(lambda kind: pt.MoRA(r=2, target_modules=TARGETS[kind]), of_mora),
    "PASTA": Case(lambda kind: pt.PASTA(special_token_ids=SPECIAL), of_pasta),
    "PTuning": Case(lambda kind: pt.PTuning(num_virtual_tokens=3, encoder_hidden_size=5), of_ptuning),
    "PaFi": Case(
        lambda kind: pt.PaFi(fraction=0.1),
        lambda kind, base, m: int(m.fraction * sum(sizes(base, lambda n: n not in TABLES[kind]).values())),
    ),
    "PiSSA": Case(lambda kind: pt.PiSSA(r=2, lora_alpha=3, target_modules=TARGETS[kind]), of_lora),
    "PrefixTuning": Case(
        lambda kind: pt.PrefixTuning(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=5), of_prefix
    ),
    "PromptTuning": Case(lambda kind: pt.PromptTuning(num_virtual_tokens=3), of_prompt),
    "ProxyTuning": Case(lambda kind: pt.ProxyTuning(alpha=0.5), lambda kind, base, _: {}, two_others),
    "ReLoRA": Case(  # without a merge: what that writes has tests of its own
        lambda kind: pt.ReLoRA(r=2, lora_alpha=3, reset_every=100, target_modules=TARGETS[kind]), of_lora
    ),
    "SLTrain": Case(
        lambda kind: pt.SLTrain(r=2, lora_alpha=3, density=0.1, target_modules=TARGETS[kind]), of_sltrain
    ),
    "SSF": Case(lambda kind: pt.SSF(), of_ssf),
    "SecondOrderMask": Case(
        lambda kind: pt.SecondOrderMask(fraction=0.1),
        lambda kind, base, m: sum(max(1, int(m.fraction * size)) for size in sizes(base).values()),
        examples,
    ),
    "SoRA": Case(lambda kind: pt.SoRA(r=2, lora_alpha=3, target_modules=TARGETS[kind]), of_sora),
    "SparseFineTuning": Case(
        lambda kind: pt.SparseFineTuning(),
        lambda kind, base, _: sum(-(-size // 3) for size in list(sizes(base).values())[::3]),
        every_third,
    ),
    "SparseAdapter": Case(
        lambda kind: pt.SparseAdapter(
            bottleneck=6, fraction=0.4, score="snip", init_std=0.3, target_modules=ENDS[kind] if kind == "net" else None
        ),
        of_sparse_adapter,
        examples,
    ),
    "UniPELT": Case(unipelt, of_unipelt),
    "VeRA": Case(lambda kind: pt.VeRA(r=5, target_modules=TARGETS[kind]), of_vera),
}  # fmt: skip

# ---- what a method can't do, and with which error it says so: by architecture, or by what is asked of it

CANNOT = {
    ("AdaMix", "merge"): r"can't be merged: a bottleneck adapter has a nonlinearity",
    ("Adapter", "merge"): r"can't be merged: a bottleneck adapter has a nonlinearity",
    (
        "AdapterFusion",
        "merge",
    ): r"can't be merged: (a bottleneck adapter has a nonlinearity|fused adapters have non)",
    ("BitFit", "t5"): r"BitFit: this model has no bias .*LayerNormTuning",
    (
        "InvertibleAdapter",
        "vit",
    ): r"what goes in for a text's tokens, and a ViTForImageClassification has none",
    ("InvertibleAdapter", "net"): r"what goes in for a text's tokens, and a Net has none that it tells of",
    ("InvertibleAdapter", "merge"): r"can't be merged: it changes what the model computes",
    ("CIAT", "vit"): r"what goes in for a text's tokens, and a ViTForImageClassification has none",
    ("CIAT", "net"): r"what goes in for a text's tokens, and a Net has none that it tells of",
    ("CIAT", "merge"): r"can't be merged",
    ("Compacter", "merge"): r"can't be merged: a bottleneck adapter has a nonlinearity",
    **{
        (
            "LLaMAAdapter",
            kind,
        ): rf"attentions that have the linear layers q_proj, .* and in a {model} there is none"
        for kind, model in (
            ("gpt2", "GPT2LMHeadModel"),
            ("bert", r"BertFor\w+"),
            ("t5", r"T5For\w+"),
            ("net", "Net"),
        )
    },
    ("LLaMAAdapter", "merge"): r"can't be merged: prompts in an attention depend on the queries",
    (
        "LST",
        "t5",
    ): r"beside one stack of blocks, .*T5ForConditionalGeneration .*: it has an encoder and a decoder",
    ("LST", "net"): r"beside one stack of blocks, and of this Net that isn't possible: it has no config",
    ("LST", "merge"): r"can't be merged: it changes what the model computes",
    ("MAM", "vit"): r"before a text's tokens, and a ViTForImageClassification has none",
    (
        "MAM",
        "net",
    ): r"before a text's tokens, and a Net has none that it tells of",
    ("MAM", "merge"): r"can't be merged",
    ("PASTA", "t5"): r"PASTA reads one text, and a T5ForConditionalGeneration has two",
    ("PASTA", "vit"): r"PASTA adds to special tokens, and a ViTForImageClassification has none",
    ("PASTA", "net"): r"PASTA adds to special tokens, and a Net has none",
    ("PASTA", "merge"): r"can't be merged",
    ("PTuning", "vit"): r"before a text's tokens, and a ViTForImageClassification has none",
    ("PTuning", "net"): r"before a text's tokens, and a Net has none that it tells of",
    ("PTuning", "merge"): r"can't be merged",
    ("PrefixTuning", "vit"): r"before a text's tokens, and a ViTForImageClassification has none",
    ("PrefixTuning", "net"): r"before a text's tokens, and a Net has none that it tells of",
    ("PrefixTuning", "merge"): r"can't be merged",
    ("PromptTuning", "vit"): r"before a text's tokens, and a ViTForImageClassification has none",
    ("PromptTuning", "net"): r"before a text's tokens, and a Net has none that it tells of",
    ("PromptTuning", "merge"): r"can't be merged",
    ("SparseAdapter", "merge"): r"can't be merged: a bottleneck adapter has a nonlinearity",
    ("UniPELT", "merge"): r"can't be merged: (a gate depends|a bottleneck adapter has|it changes what)",
    ("ProxyTuning", "bert"): r"steers what a causal language model writes next, and a BertForS\w+ isn't one",
    ("ProxyTuning", "t5"): r"steers what .*, and a T5ForConditionalGeneration has an encoder",
    ("ProxyTuning", "vit"): r"steers what a causal language model writes next, and a ViTFor\w+ isn't one",
    ("ProxyTuning", "net"): r"steers what a causal language model writes next, and a Net isn't one",
    ("ProxyTuning", "merge"): r"can't be merged: it adds other models' logits",
}
STARTS_OTHERWISE = {
    "Masking": "it prunes init_sparsity of the weights at once",
    "Compacter": "its adapters start near zero, and not at it",
    "SparseAdapter": "its adapters start near zero, and not at it",
    "AdapterFusion": "it starts as a mean of what the adapters have learned",
    "LST": "what it says comes through its side network alone",
    "ProxyTuning": "it steers at once",
}


def starts_otherwise(name: str, method: Any) -> str | None:
    """Why a model doesn't start as its base, or None. Whatever has virtual tokens doesn't."""
    virtual = getattr(method, "num_virtual_tokens", 0)
    return STARTS_OTHERWISE.get(name, "the model sees other words or keys" if virtual else None)


# Refuse a cache of fixed length.
ITS_OWN_CACHES = ("LST", "MAM", "PrefixTuning", "ProxyTuning", "PromptTuning", "PTuning")
TRAINS_NOTHING = (
    "ProxyTuning",
)  # what it adds are other models, as they are: no gradient, no step and no file
NO_SLOPE = {
    "DoRA": "it takes a norm for a constant",
    "Masking": "its gradient goes straight through a step",
}
LEARNS_STATISTICS = (
    "AutoFreeze",
    "ChildTuningF",
    "LTSFT",
)  # full fine-tuning, with the buffers, which are saved

# ---- models and batches


def batch_of(kind: str, side: str = "right", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """`tiny_batch`, with special tokens: one at the start of each text, and one more within the first."""
    batch = tiny_batch(kind, side=side, dtype=dtype)
    if kind in TEXTS:
        first = batch["attention_mask"].argmax(1)
        batch["input_ids"][torch.arange(3), first] = SPECIAL[0]
        batch["input_ids"][0, 5] = SPECIAL[1]
        if kind != "bert":
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


@cache
def base_of(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The base, for looking at only: see `fresh`."""
    shorter = {"num_layers": 1, "num_decoder_layers": 2} if kind == "t5" else {}  # its encoder has one block
    return tiny_model(kind, dtype=dtype, **shorter)


def fresh(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The base, to work with."""
    return copy.deepcopy(base_of(kind, dtype))


@cache
def base_answer(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the base says to `batch_of(kind)`."""
    return answer(base_of(kind, dtype), batch_of(kind, dtype=dtype))


def prepared(name: str, kind: str) -> nn.Module:
    """The base with what it must carry before the method is attached, to work with."""
    return CASES[name].before(kind, fresh(kind))


@cache
def beneath(name: str, kind: str) -> set[str]:
    """The names of all that a prepared base holds."""
    return set(tensors(base_of(kind) if CASES[name].before is as_it_is else prepared(name, kind)))


def attach(name: str, kind: str, model: nn.Module) -> nn.Module:
    """Attach the method to a model as CASES says."""
    arguments, how = CASES[name].sources(kind, model)
    return CASES[name].make(kind).attach(CASES[name].before(kind, model), *arguments, **how)


@cache
def _attached(name: str, kind: str, dtype: torch.dtype) -> nn.Module:
    return attach(name, kind, fresh(kind, dtype))


def attached_to(name: str, kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with the method freshly attached. Choosing by data takes long, so it is done once, and copied."""
    return copy.deepcopy(_attached(name, kind, dtype))


@cache
def looked_at(name: str, kind: str) -> nn.Module:
    """The same, moved from the start in all that trains, as after some training; for looking at only.

    `test_looking_has_changed_nothing` sees to it that nobody does more.
    """
    LOOKED_AT[name, kind] = model = moved(attached_to(name, kind))
    loss_of(
        model, batch_of(kind)
    )  # it writes chosen entries into their weights, and notes what labels are in the config
    BEFORE[name, kind] = picture(model)
    return model


def learned_on(name: str, kind: str) -> nn.Module:
    """The same, to work with."""
    return copy.deepcopy(looked_at(name, kind))


@cache
def said(name: str, kind: str, side: str = "right") -> Tensor:
    """What it says to `batch_of(kind, side)`."""
    return answer(looked_at(name, kind), batch_of(kind, side))


LOOKED_AT: dict[tuple[str, str], nn.Module] = {}
BEFORE: dict[tuple[str, str], dict[str, Any]] = {}


def moved(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"]) if "x" in batch else model(**batch).logits


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    if "x" in batch:
        return F.cross_entropy(model(batch["x"]), batch["labels"])
    return model(**batch).loss


def answer(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits, without a graph."""
    with torch.no_grad():
        return logits_of(model, batch)


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    """The gradient of a value with respect to all that trains and gets one."""
    model.zero_grad()
    value.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    return found
