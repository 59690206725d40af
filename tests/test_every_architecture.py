"""Every method on every architecture of tests/architectures.py: it holds, or it is refused in words that help.

A cell is one method on one architecture. It runs all checks below on tiny models; a cell that is refused is checked
for the words of the refusal, and for a model that was left as it was. In CI runs a slice, see `_cells`; the
full matrix runs with `pytest -m architectures`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import pefttutor
from pefttutor.catalog import methods
from pefttutor.parts.blocks import blocks
from pefttutor.parts.cached_attention import form_of
from pefttutor.parts.linear import all_linear, sizes
from pefttutor.parts.sublayers import sublayers
from tests.architectures import ARCHITECTURES, BATCHES, FAMILIES, Architecture
from tests.cases import CANNOT, TRAINS_NOTHING, starts_otherwise
from tests.formulas import FORMULAS, USED

# ---- how a method is set up on an architecture

# Methods of a rank and linear layers, set up and refused as LoRA is.
LIKE_LORA = (
    "DoRA", "DyLoRA", "LoHa", "LoKr", "LoRAFA", "LoRAPlus", "LoTR", "MELoRA", "MiLoRA", "MoRA", "PiSSA", "SLTrain",
    "SoRA", "VeRA",
)  # fmt: skip
# Tensors that no weight is made of: what makes use of them is put around the base, by hooks.
IN_HOOKS = (
    "adamix_",
    "adapter_",
    "sparse_",
    "adaption_",
    "compacter_",
    "embedding_",
    "fusion_",
    "invertible_",
    "lst_",
)
GATES = ("lora_gate_", "prefix_gate_")
# Tensors that are met in the formula of another one.
IN_ANOTHERS = {
    "lora_B",
    "lora_E",
    "lora_gate",
    "lora_magnitude_vector",
    "lora_sensitivity",
    "lora_update_ratio",
    *USED,
}


@dataclass(frozen=True)
class SetUp:
    """A method with settings that make sense on an architecture, and what it is attached with."""

    method: Any
    sources: tuple[Any, ...] = ()
    prepare: Callable[[Any, Any], None] = lambda model, method: None  # after attaching
    before: Callable[[Any], None] = lambda model: None  # what it must carry already


def set_up(name: str, architecture: Architecture, model: nn.Module) -> SetUp:
    kind = methods()[name.split(",")[0]]
    # Where the model reads a weight past its layer, no part of it can train; as a whole it can.
    saved = {"modules_to_save": architecture.past}
    targets = architecture.names(model, architecture.targets)
    scaled = architecture.names(model, architecture.scaled)
    rows = rows_of(BATCHES[architecture.batch]())
    share = 0.5 if architecture.past else 0.05  # the head counts in FishMask's budget
    known: dict[str, Callable[[], SetUp]] = {
        "LoRA": lambda: SetUp(kind(r=2, target_modules=targets)),
        "LoRA, all-linear": lambda: SetUp(kind(r=1, target_modules="all-linear", lora_dropout=0.1, **saved)),
        "Adapter": lambda: SetUp(
            kind(bottleneck=3, scaling=2.0, target_modules=_where_not_found(model, scaled))
        ),
        "AdaMix": lambda: SetUp(kind(bottleneck=3, target_modules=_where_not_found(model, scaled))),
        "SparseAdapter": lambda: SetUp(
            kind(
                bottleneck=6, fraction=0.4, score="magnitude", target_modules=_where_not_found(model, scaled)
            )
        ),
        "AdapterFusion": lambda: SetUp(
            kind(adapters=("a", "b")),
            before=functools.partial(_two_adapters, _where_not_found(model, scaled)),
        ),
        "AdapterBias": lambda: SetUp(kind(target_modules=_where_not_found(model, scaled))),
        "InvertibleAdapter": lambda: SetUp(kind()),
        "LLaMAAdapter": lambda: SetUp(kind(adapter_len=3)),
        "LST": lambda: SetUp(kind(reduction=2)),
        "MAM": lambda: SetUp(
            kind(
                num_virtual_tokens=3, bottleneck=3, scaling=2.0, activation="gelu", **_beside(model, targets)
            )
        ),
        "UniPELT": lambda: SetUp(_unipelt(kind, architecture, model, targets, scaled)),
        "CIAT": lambda: SetUp(
            kind(bottleneck=3, embedding_bottleneck=2, activation="gelu", **_beside(model, targets))
        ),
        "Compacter": lambda: SetUp(
            kind(bottleneck=4, n=2, r=2, target_modules=_where_not_found(model, scaled))
        ),
        # With the draws of seed 0 two of DistilBERT's ReLU units lie so near zero that autocast's rounding opens them.
        "AdaLoRA": lambda: SetUp(
            kind(init_r=3, target_r=2, total_step=2, target_modules=targets, init_seed=1)
        ),
        "DynamicDoRA": lambda: SetUp(kind(init_r=3, target_r=2, total_step=2, target_modules=targets)),
        **{name: lambda: SetUp(kind(r=2, target_modules=targets)) for name in LIKE_LORA},
        # L and R are of size 1, so with a larger s the merged weights are rounded visibly. And with the draws of seed 0
        # three of OPT's ReLU units lie so near zero that autocast's rounding switches them.
        "LoTR": lambda: SetUp(kind(r=2, lora_alpha=2, target_modules=targets, init_seed=2)),
        "DeltaLoRA": lambda: SetUp(kind(r=2, start_steps=1, target_modules=targets)),
        "ReLoRA": lambda: SetUp(kind(r=2, reset_every=2, target_modules=targets)),
        "IncreLoRA": lambda: SetUp(kind(init_r=2, target_r=2, max_r=2, target_modules=targets)),
        "LoRAHub": lambda: SetUp(
            kind(plugins=("a", "b"), combine="deltas"), before=functools.partial(_two_plugins, targets)
        ),
        "MPO": lambda: SetUp(kind(bond_dim=2, target_modules=targets)),
        "COLA": lambda: SetUp(kind(r=2, link_steps=2, target_modules=targets)),
        "IA3": lambda: SetUp(kind(target_modules=scaled, feedforward_modules=scaled[-1:])),
        "BitFit": lambda: SetUp(kind()),
        "SSF": lambda: SetUp(kind()),
        "LayerNormTuning": lambda: SetUp(kind()),
        "LinearProbe": lambda: SetUp(kind(modules_to_save=architecture.names(model, (architecture.head,)))),
        "LastLayers": lambda: SetUp(kind(fraction=0.5)),
        "PaFi": lambda: SetUp(kind(fraction=0.05, **saved)),
        "SparseFineTuning": lambda: SetUp(kind(**saved), (_some_entries(model),)),
        "FishMask": lambda: SetUp(kind(fraction=share, **saved), (rows,)),
        "FishDip": lambda: SetUp(kind(fraction=0.05, **saved), (rows,)),
        "SecondOrderMask": lambda: SetUp(kind(fraction=0.05, **saved), (rows,)),
        "ChildTuningD": lambda: SetUp(kind(p_D=0.1, **saved), (rows,)),
        "ChildTuningF": lambda: SetUp(kind(p_F=0.5)),
        "Masking": lambda: SetUp(kind(target_modules=_matrices(model), init_sparsity=0.1, **saved)),
        "DiffPruning": lambda: SetUp(kind(**saved)),
        "LTSFT": lambda: SetUp(kind(fraction=0.1, **saved), (), _second_phase),
        "AutoFreeze": lambda: SetUp(kind(interval=1)),
        "ProxyTuning": lambda: SetUp(kind(alpha=0.5), tuple(_changed(model, seed) for seed in (1, 2))),
        "PASTA": lambda: SetUp(kind(special_token_ids=_in_the_texts(rows))),
        "PTuning": lambda: SetUp(kind(num_virtual_tokens=3, encoder_hidden_size=5, encoder_num_layers=1)),
        "PrefixTuning": lambda: SetUp(kind(num_virtual_tokens=3)),
        "PromptTuning": lambda: SetUp(kind(num_virtual_tokens=3)),
    }
    if name in known:
        return known[name]()
    fields = getattr(kind, "__dataclass_fields__", {})  # a method that this test doesn't know yet
    return SetUp(kind(target_modules=targets) if "target_modules" in fields else kind())


def _where_not_found(model: nn.Module, scaled: tuple[str, ...]) -> tuple[str, ...] | None:
    """None where the ends of the sublayers are found; else the feed-forward's second layer, or what is near it."""
    try:
        sublayers(model)
    except ValueError:
        return scaled[-1:]
    return None


def _beside(model: nn.Module, targets: tuple[str, ...]) -> dict[str, Any]:
    """Where parallel adapters stand and what they read, where that isn't found: beside a square layer, its input."""
    if _where_not_found(model, targets) is None:
        return {}
    square = {
        n: m for n, m in all_linear(model, set()).items() if n.endswith(targets) and len({*sizes(m)}) == 1
    }
    return {"adapter_modules": tuple(square), "input_modules": tuple(square)}


def _unipelt(
    kind: Any, architecture: Architecture, model: nn.Module, targets: tuple[str, ...], scaled: tuple[str, ...]
) -> Any:
    """With a prefix where the attention takes one; what writes has a gate for each token, and no prefix."""
    ends, prefix = _where_not_found(model, scaled), 0
    if not architecture.generates:
        with contextlib.suppress(ValueError):
            form_of(model, "")
            prefix = 3
    gate = "token" if architecture.generates else "text"
    lora = tuple(n for n in targets if n not in (ends or ()))
    how = {"bottleneck": 3, "activation": "gelu", "adapter_modules": ends, "r": 2, "lora_modules": lora}
    return kind(num_virtual_tokens=prefix, gate=gate, **how)


def _two_adapters(targets: tuple[str, ...] | None, model: nn.Module) -> None:
    """Two that have learned something, switched off."""
    for seed, name in enumerate("ab"):
        pefttutor.Adapter(bottleneck=3, scaling=2.0, target_modules=targets).attach(model, name=name)
        spread(pefttutor.switch(model, name), seed=seed)
    pefttutor.switch(model)


def _two_plugins(targets: Any, model: nn.Module) -> None:
    """Two that have learned something, switched off."""
    for seed, name in enumerate("ab"):
        pefttutor.LoRA(r=2, target_modules=targets).attach(model, name=name)
        spread(pefttutor.switch(model, name), seed=seed)
    pefttutor.switch(model)


def _changed(model: nn.Module, seed: int) -> nn.Module:
    """A copy with other weights, as an expert."""
    other = copy.deepcopy(model)
    spread(other, scale=0.05, seed=seed)
    return other


def _some_entries(model: nn.Module) -> dict[str, Tensor]:
    """A fifth of every tensor that trains, at random."""
    g = torch.Generator().manual_seed(3)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: torch.rand(p.shape, generator=g) < 0.2 for name, p in trained.items()}


def _matrices(model: nn.Module) -> tuple[str, ...]:
    """The whole names of all layers with a matrix as weight: linear ones, embeddings, convolutions, heads."""
    weights = {name: module._parameters.get("weight") for name, module in model.named_modules()}
    return tuple(name for name, weight in weights.items() if weight is not None and weight.dim() >= 2)


def _second_phase(model: nn.Module, method: Any) -> None:
    spread(model, scale=0.01)
    method.rewind(model)


def _in_the_texts(rows: list[dict[str, Tensor]]) -> tuple[int, ...]:
    """Some tokens that are in the texts, more than one in each."""
    texts = [row["input_ids"][-8:] for row in rows if "input_ids" in row]
    return tuple(int(text[place]) for text in texts for place in (0, 2, 4)) or (1, 2)


NAMES = tuple(sorted([*methods(), "LoRA, all-linear"]))


def rows_of(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{key: value[i] for key, value in batch.items()} for i in range(len(next(iter(batch.values()))))]


def spread(model: nn.Module, scale: float = 0.1, seed: int = 1) -> None:
    """Let everything that trains have values as after some training: at the start half the errors don't show."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        draw = torch.randn(p.shape, generator=g)
        if name.endswith(("_alpha", "_group")):  # gates: a little open
            p.data.copy_(0.8 + 0.4 * draw)
        else:
            p.data.add_((scale * draw).to(p.dtype))


# ---- what a model says, and its loss


def loss_of(model: Any, batch: Mapping[str, Any]) -> Tensor:
    return model(**batch).loss if "labels" in batch else model(**batch, return_loss=True).loss


@torch.no_grad()
def said(model: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    mode = model.training
    model.eval()
    output = model(**batch)
    model.train(mode)
    return {key: value for key, value in output.items() if isinstance(value, Tensor)}


def bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().clone()
    return (
        tensor
        if tensor.dim() == 0 or not tensor.is_floating_point()
        else tensor.contiguous().view(torch.uint8)
    )


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(bits(one), bits(other))


@dataclass
class Form:
    """All that a model is, to compare with later."""

    tensors: dict[str, Tensor]
    trains: dict[str, bool]
    classes: dict[str, str]
    attributes: dict[str, list[str]]
    hooks: dict[str, list[int]]

    @classmethod
    def of(cls, model: nn.Module) -> Form:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_backward_hooks",
                  "_forward_pre_hooks_with_kwargs", "_non_persistent_buffers_set")  # fmt: skip
        return cls(
            {name: t.detach().clone() for name, t in tensors.items()},
            {name: p.requires_grad for name, p in model.named_parameters()},
            {name: type(m).__name__ for name, m in model.named_modules()},
            {name: sorted(vars(m)) for name, m in model.named_modules()},
            {name: [len(vars(m)[table]) for table in tables] for name, m in model.named_modules()},
        )

    def check(self, model: nn.Module) -> None:
        now = Form.of(model)
        for what in ("classes", "attributes", "hooks", "trains"):
            before, after = getattr(self, what), getattr(now, what)
            differ = [n for n in before.keys() | after.keys() if before.get(n) != after.get(n)]
            assert not differ, (
                f"{what} of {differ[:3]} were {before.get(differ[0])}, are {after.get(differ[0])}"
            )
        assert list(self.tensors) == list(now.tensors), set(self.tensors) ^ set(now.tensors)
        changed = [n for n, t in self.tensors.items() if not same_bits(t, now.tensors[n])]
        assert not changed, f"other bits in {changed[:4]}"


# ---- the gradient, from the formulas


@dataclass
class ByHand:
    """What trains as leaves, by the name it is saved under; the base's weights made of these; PASTA's vectors; the
    projections of adapters; those of fusions, and of the adapters that they fuse; the prompts of attentions; a prompt;
    and a prefix."""

    leaves: dict[str, Tensor]
    weights: dict[str, Tensor]
    vectors: dict[str, Tensor]
    adapters: dict[str, dict[str, Tensor]]
    fusions: dict[str, dict[str, Tensor]]
    fused: list[dict[str, dict[str, Tensor]]]
    prompts: dict[str, dict[str, Tensor]]
    prompt: Tensor | None = None
    prefix: Tensor | None = None

    @classmethod
    def of(cls, model: nn.Module, base: nn.Module) -> ByHand:
        attachment = its_own(model)
        saved, method = attachment.tensors(model), attachment.method
        W = {name: t.detach() for name, t in (*base.named_parameters(), *base.named_buffers())}
        trained = {
            n: t for n, t in saved.items() if t.is_floating_point() and n not in dict(base.named_buffers())
        }
        leaves = {n: t.clone().requires_grad_() for n, t in trained.items()}
        made, vectors, prompt, prefix = {}, {}, None, None
        adapters = (
            _by_layer(leaves, "adapter_")
            | _of_products(leaves)
            | _of_experts(leaves)
            | _of_cut(leaves, saved)
        )
        fusions = _by_layer(leaves, "fusion_")
        prompts = _by_layer(leaves, "adaption_")
        fused = [
            _by_layer(a.tensors(model), "adapter_")
            for a in pefttutor.attached(model).values()
            if a is not attachment
        ]
        for name, leaf in leaves.items():
            path, _, key = name.rpartition(".")
            full, _, ending = name.rpartition("_")
            weight, bias = f"{path}.weight", f"{path}.bias"
            turned = type(base.get_submodule(path)).__name__ in ("Conv1D", "Embedding")  # stored as (in, out)
            if name in W:
                made.setdefault(name, leaf)  # of ReLoRA the weight with what is added to it is there already
            elif key == "lora_A" and f"{path}.lora_gate_weight" in leaves:
                pass  # see `_gated`
            elif key == "lora_A" and f"{path}.sltrain_values" in leaves:
                pass  # part of that formula
            elif key == "lora_A":
                lambdas = leaves.get(f"{path}.lora_E", leaves.get(f"{path}.lora_gate"))
                scaling = method.scaling
                delta = scaling * leaves[f"{path}.lora_B"] @ (leaf if lambdas is None else lambdas * leaf)
                start = [leaves.get(f"{path}.lora_{factor}_start") for factor in "BA"]
                if start[0] is not None:
                    delta = delta - method.scaling * start[0] @ start[1]
                made[weight] = W[weight] + (delta.t() if turned else delta)
                magnitude = leaves.get(f"{path}.lora_magnitude_vector")
                if magnitude is not None:  # for the gradient the norm of each row is a constant
                    norm = made[weight].detach().norm(dim=0 if turned else 1)
                    made[weight] = made[weight] * (
                        magnitude / norm if turned else (magnitude / norm)[:, None]
                    )
            elif key in FORMULAS:
                formula, keys = FORMULAS[key]
                own = saved | leaves
                given = {each: own[f"{path}.{each}"] for each in keys if f"{path}.{each}" in own}
                given |= {each: shared for each, shared in leaves.items() if "." not in each}
                n_in, n_out = sizes(base.get_submodule(path))
                delta = formula(given, n_in, n_out, method, model)
                made[weight] = W[weight] + (delta.t() if turned else delta)
            elif key == "adapterbias_v":
                w = leaves[f"{path}.adapterbias_w"]
                made[weight] = W[weight] + (torch.outer(w, leaf) if turned else torch.outer(leaf, w))
                if f"{path}.adapterbias_b" in leaves:
                    made[bias] = W[bias] + leaves[f"{path}.adapterbias_b"] * leaf
            elif key == "ia3_l":
                on_input = path.endswith(tuple(method.feedforward_modules))
                made[weight] = W[weight] * (leaf if on_input != turned else leaf[:, None])
                if bias in W and not on_input:
                    made[bias] = W[bias] * leaf
            elif key == "ssf_scale":
                made[weight] = W[weight] * (leaf if turned else leaf.view(-1, *[1] * (W[weight].dim() - 1)))
                if f"{path}.ssf_shift" in leaves:
                    made[bias] = W[bias] * leaf + leaves[f"{path}.ssf_shift"]
            elif ending == "values":
                place = saved[f"{full}_index"].long()
                made[full] = W[full].flatten().index_put((place,), leaf).view_as(W[full])
            elif ending == "scores":  # the step has the gradient 1
                made[full] = W[full] * ((leaf > method.threshold).to(leaf.dtype) + leaf - leaf.detach())
            elif ending == "delta":
                z = [
                    (leaves[f"{full}_{gate}"].sigmoid() * 3 - 1.5).clamp(0, 1) for gate in ("alpha", "group")
                ]
                made[full] = W[full] + z[0] * z[1] * leaf
            elif key == "lorahub_weights":
                for w, plugin in zip(leaf, method.plugins, strict=True):
                    plugged = pefttutor.attached(model)[plugin]
                    for place, A in plugged.tensors(model).items():
                        at, _, what = place.rpartition(".")
                        if what != "lora_A":
                            continue
                        delta = w * plugged.method.scaling * plugged.tensors(model)[f"{at}.lora_B"] @ A
                        turned = type(base.get_submodule(at)).__name__ in ("Conv1D", "Embedding")
                        before = made.get(f"{at}.weight", W[f"{at}.weight"])
                        made[f"{at}.weight"] = before + (delta.t() if turned else delta)
            elif key.startswith(("lotr_L", "lotr_R")):
                pass  # shared: see the layers' own
            elif key == "special":
                vectors[path] = leaf
            elif key == "prompt":
                prompt = leaf
            elif key == "prefix":
                prefix = leaf
            elif key.startswith("ptuning_"):
                prompt = _encoded({n.rpartition(".ptuning_")[2]: leaf for n, leaf in leaves.items()})
            elif not key.startswith((*IN_HOOKS, *GATES, "adapterbias_", "ssf_shift")) and (
                key not in IN_ANOTHERS and ending not in ("alpha", "start", "group", "norms")
            ):
                raise NotImplementedError(f"this test has no formula for {name}: write it here")
        return cls(leaves, made, vectors, adapters, fusions, fused, prompts, prompt, prefix)


def _by_layer(tensors: Mapping[str, Tensor], start: str) -> dict[str, dict[str, Tensor]]:
    """Those whose key begins so, without that beginning, by their layer."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        path, _, key = name.rpartition(".")
        if key.startswith(start):
            found.setdefault(path, {})[key.removeprefix(start)] = tensor
    return found


def _of_products(leaves: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The projections of adapters that are sums of Kronecker products with the model's A."""
    made: dict[str, dict[str, Tensor]] = {}
    for path, w in _by_layer(leaves, "compacter_").items():
        for which in ("down", "up") if path else ():
            products = zip(leaves["compacter_A"], w[f"{which}_S"], w[f"{which}_T"], strict=True)
            total = sum(torch.kron(A, S @ T) for A, S, T in products)
            made.setdefault(path, {}).update({which: total.t(), f"{which}_bias": w[f"{which}_bias"]})
    return made


def _of_experts(leaves: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The mean of the experts that an adapter has of a projection."""
    shared = {"down": 2, "down_bias": 1, "up": 2, "up_bias": 1}  # how many dimensions one has
    return {
        path: {key: t if t.dim() == shared[key] else sum(t) / len(t) for key, t in w.items()}
        for path, w in _by_layer(leaves, "adamix_").items()
    }


def _of_cut(leaves: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The projections of adapters of which some weights are kept, put into zeros."""
    found: dict[str, dict[str, Tensor]] = {}
    for path, w in _by_layer(leaves, "sparse_").items():
        m, d = len(w["down_bias"]), len(w["up_bias"])
        for which, shape in (("down", (m, d)), ("up", (d, m))):
            place = saved[f"{path}.sparse_{which}_place"]
            dense = torch.zeros(m * d).scatter(0, place, w[f"{which}_kept"]).view(shape)
            found.setdefault(path, {}).update({which: dense, f"{which}_bias": w[f"{which}_bias"]})
    return found


def its_own(model: nn.Module) -> Any:
    """The attachment of the method that is tested, whatever it stands on."""
    return pefttutor.attached(model)["default"]


@contextlib.contextmanager
def _special(base: nn.Module, vectors: Mapping[str, Tensor], batch: Any, method: Any) -> Iterator[None]:
    """PASTA by hand: the i-th special token of each text gets the i-th vector, before each block."""

    def add(vector: Tensor, block: nn.Module, args: Any, kwargs: Any) -> Any:
        special = torch.isin(batch["input_ids"], torch.tensor(method.special_token_ids))
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        for text, row in enumerate(special & batch["attention_mask"].bool()):
            for i, place in enumerate(row.nonzero().flatten().tolist()[: method.num_special]):
                hidden[text, place] += vector[i]
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    handles = [
        base.get_submodule(path).register_forward_pre_hook(functools.partial(add, vector), with_kwargs=True)
        for path, vector in vectors.items()
    ]
    yield
    for handle in handles:
        handle.remove()


@contextlib.contextmanager
def _coupled(base: Any, networks: Mapping[str, Mapping[str, Tensor]]) -> Iterator[None]:
    """An additive coupling by hand, before the blocks begin and inversely before the output embeddings."""
    if not networks:
        yield
        return
    (w,) = networks.values()
    both = base.config.is_encoder_decoder
    stacks = [base.get_encoder(), base.get_decoder()] if both else [base]

    def network(which: str, x: Tensor) -> Tensor:
        down, down_bias, up, up_bias = (w[f"{which}_{key}"] for key in ("down", "down_bias", "up", "up_bias"))
        return torch.relu(x @ down.t() + down_bias) @ up.t() + up_bias

    def replaced(args: Any, kwargs: Any, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        new = torch.cat(change(*x.tensor_split(2, -1)), -1)
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    def enter(block: Any, args: Any, kwargs: Any) -> Any:
        def change(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            a = a + network("F", b)
            return a, b + network("G", a)

        return replaced(args, kwargs, change)

    def leave(head: Any, args: Any, kwargs: Any) -> Any:
        def change(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            b = b - network("G", a)
            return a - network("F", b), b

        return replaced(args, kwargs, change)

    handles = [blocks(stack)[1][0].register_forward_pre_hook(enter, with_kwargs=True) for stack in stacks]
    head = base.get_output_embeddings()
    if head is not None:
        handles.append(head.register_forward_pre_hook(leave, with_kwargs=True))
    yield
    for handle in handles:
        handle.remove()


@contextlib.contextmanager
def _over_embeddings(base: nn.Module, found: Mapping[str, Mapping[str, Tensor]]) -> Iterator[None]:
    """A bottleneck by hand over what goes into a first block, behind a norm that is written out."""

    def enter(w: Mapping[str, Tensor], block: nn.Module, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        centred = x - x.mean(-1, keepdim=True)
        normed = (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w["norm"] + w["norm_bias"]
        )
        new = x + torch.relu(normed @ w["down"].t() + w["down_bias"]) @ w["up"].t() + w["up_bias"]
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    handles = [
        base.get_submodule(path).register_forward_pre_hook(functools.partial(enter, w), with_kwargs=True)
        for path, w in found.items()
    ]
    yield
    for handle in handles:
        handle.remove()


@contextlib.contextmanager
def _adapters(
    base: nn.Module, adapters: Mapping[str, Mapping[str, Tensor]], method: Any, batch: Any
) -> Iterator[None]:
    """Adapters by hand: what a layer gives, and s times two matrices with GELU between them applied to it."""

    read: dict[str, Tensor] = {}
    beside = isinstance(method, (pefttutor.MAM, pefttutor.CIAT))  # a sublayer: it reads what that reads
    starts = {s.end: s.start for s in sublayers(base)} if beside and method.adapter_modules is None else {}

    def note(path: str, layer: nn.Module, args: Any) -> None:
        read[path] = args[0]

    def add(path: str, layer: nn.Module, args: Any, h: Tensor) -> Tensor:
        w, x = adapters[path], read.get(path, h)
        g = _mean_gate(w, x, batch, method) if "gate_weight" in w else getattr(method, "scaling", 1.0)
        return h + g * _branch(w, x)

    handles = [
        base.get_submodule(path).register_forward_hook(functools.partial(add, path)) for path in adapters
    ]
    if beside:
        handles += [
            base.get_submodule(starts.get(path, path)).register_forward_pre_hook(
                functools.partial(note, path)
            )
            for path in adapters
        ]
    yield
    for handle in handles:
        handle.remove()


def _mean_gate(w: Mapping[str, Tensor], x: Tensor, batch: Mapping[str, Tensor], method: Any) -> Tensor:
    """σ(w · x + b), and its mean over a text's real tokens, text by text."""
    g = (x @ w["gate_weight"] + w["gate_bias"]).sigmoid()
    mask = batch.get("attention_mask")
    if method.gate == "text":
        mask = mask if mask is not None and mask.shape == g.shape else torch.ones_like(g)
        g = torch.stack([row[real.bool()].mean().expand_as(row) for row, real in zip(g, mask, strict=True)])
    return g[..., None]


@contextlib.contextmanager
def _gated(base: nn.Module, leaves: Mapping[str, Tensor], batch: Any, method: Any) -> Iterator[None]:
    """LoRA with a gate in the place of its scaling by hand."""

    def add(w: Mapping[str, Tensor], layer: nn.Module, args: Any, y: Tensor) -> Tensor:
        return y + _mean_gate(w, args[0], batch, method) * (args[0] @ w["A"].t() @ w["B"].t())

    changed = {path: w for path, w in _by_layer(leaves, "lora_").items() if "gate_weight" in w}
    handles = [
        base.get_submodule(path).register_forward_hook(functools.partial(add, w))
        for path, w in changed.items()
    ]
    yield
    for handle in handles:
        handle.remove()


def _branch(w: Mapping[str, Tensor], h: Tensor) -> Tensor:
    narrow = torch.nn.functional.gelu(h @ w["down"].t() + w["down_bias"])
    return narrow @ w["up"].t() + w["up_bias"]


@contextlib.contextmanager
def _fusions(
    base: nn.Module, fusions: Mapping[str, Mapping[str, Tensor]], fused: Iterable[Any]
) -> Iterator[None]:
    """Fusions by hand: attention of what a layer gives over what its adapters, with s = 2, add to it."""

    def add(path: str, layer: nn.Module, args: Any, h: Tensor) -> Tensor:
        w, z = fusions[path], [2.0 * _branch(adapters[path], h) for adapters in fused]
        query = h @ w["query"].t() + w["query_bias"]
        scores = torch.stack([(query * (each @ w["key"].t())).sum(-1) for each in z])
        chosen = [
            s[..., None] * (each @ w["value"].t()) for s, each in zip(scores.softmax(0), z, strict=True)
        ]
        return h + sum(chosen)

    handles = [
        base.get_submodule(path).register_forward_hook(functools.partial(add, path)) for path in fusions
    ]
    yield
    for handle in handles:
        handle.remove()


@contextlib.contextmanager
def _with_prompts(base: nn.Module, prompts: Mapping[str, Mapping[str, Tensor]]) -> Iterator[None]:
    """Prompts in attentions by hand: each head's queries, turned as complex numbers, look at them one by one."""

    def heads(attention: Any, x: Tensor, norm: str) -> Tensor:
        d, normalise = attention.head_dim, getattr(attention, norm, lambda x: x)
        x = x if getattr(normalise, "weight", x).shape[-1:] != (d,) else x.unflatten(-1, (-1, d))
        x = normalise(x)
        return x if x.shape[-1] == d and x.dim() > 3 else x.unflatten(-1, (-1, d)) if x.shape[-1] != d else x

    def attend(path: str, attention: Any, args: Any, kwargs: Any) -> Any:
        w, h = prompts[f"{path}.o_proj"], kwargs.get("hidden_states", args[0] if args else None)
        d, rotation = (
            attention.head_dim,
            kwargs.get("position_embeddings", args[1] if len(args) > 1 else None),
        )
        q = heads(attention, attention.q_proj(h), "q_norm").view(*h.shape[:2], -1, d)
        if isinstance(rotation, tuple):
            cos, sin = rotation
            half = cos.shape[-1] // 2
            angles = torch.complex(cos, sin)[..., None, :half]
            turned = torch.complex(q[..., :half], q[..., half : 2 * half]) * angles
            q = torch.cat([turned.real, turned.imag, q[..., 2 * half :]], -1)
        K = heads(attention, attention.k_proj(w["prompt"]), "k_norm").view(len(w["prompt"]), -1, d)
        V = attention.v_proj(w["prompt"]).view(len(w["prompt"]), -1, d)
        found, shared = [], q.shape[2] // K.shape[1]
        for head in range(q.shape[2]):
            seen = attention.scaling * q[:, :, head] @ K[:, head // shared].t()
            cap = getattr(attention, "attn_logit_softcapping", None)
            seen = seen if cap is None else cap * (seen / cap).tanh()
            found.append(w["gate"] * seen.softmax(-1) @ V[:, head // shared])
        more = torch.cat(found, -1)
        handle = attention.o_proj.register_forward_pre_hook(
            lambda layer, x: (handle.remove(), (x[0] + more,))[1]
        )

    handles = [
        base.get_submodule(place.removesuffix(".o_proj")).register_forward_pre_hook(
            functools.partial(attend, place.removesuffix(".o_proj")), with_kwargs=True
        )
        for place in prompts
    ]
    yield
    for handle in handles:
        handle.remove()


def _encoded(given: Mapping[str, Tensor]) -> Tensor:
    """What P-tuning's encoder makes of its table: an LSTM of one layer, written out, and two linear layers."""

    def states(way: str) -> list[Tensor]:
        w, u, b, c = (
            given[f"lstm_{kind}_l0{way}"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h = cell = torch.zeros(u.shape[1])
        found = []
        for x in given["table"].flip(0) if way else given["table"]:
            i, f, g, o = (w @ x + b + u @ h + c).chunk(4)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            h = o.sigmoid() * cell.tanh()
            found.append(h)
        return found[::-1] if way else found

    both = torch.cat([torch.stack(states("")), torch.stack(states("_reverse"))], 1)
    inner = (both @ given["head_0_weight"].t() + given["head_0_bias"]).relu()
    return inner @ given["head_2_weight"].t() + given["head_2_bias"]


@contextlib.contextmanager
def _prompted(base: Any, prompt: Tensor, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Virtual tokens by hand: the texts, which are padded on the right, come as embeddings with the prompt before."""
    count, both, handles = len(prompt), base.config.is_encoder_decoder, []

    def longer(key: str, value: int) -> Tensor:
        return torch.cat([inputs[key].new_full((len(inputs[key]), count), value), inputs[key]], 1)

    def embed(module: Any, args: Any, kwargs: Any) -> Any:
        """Where ids become embeddings, the virtual ones are the prompt, whatever else is made of the ids."""
        ids = kwargs.pop("input_ids", None) if not args else args[0]
        words = module.get_input_embeddings()(ids)
        words = torch.cat([prompt.expand(len(ids), -1, -1), words[:, count:]], 1)
        return (), kwargs | {"inputs_embeds": words}

    def cut(module: Any, args: Any, output: Any) -> Any:
        """Before a head or a pooler looks at the first token."""
        if isinstance(output, Tensor):
            return output[:, count:] if output.dim() == 3 else output
        parts = {k: cut(module, args, v) for k, v in output.items()} if isinstance(output, dict) else None
        return type(output)(**parts) if parts else tuple(cut(module, args, each) for each in output)

    body = base.get_encoder() if both else base.base_model
    body = getattr(body, "decoder", body) if not both else body  # OPT's
    handles.append(body.register_forward_pre_hook(embed, with_kwargs=True))
    inputs = inputs | {"input_ids": longer("input_ids", 3), "attention_mask": longer("attention_mask", 1)}
    if "token_type_ids" in inputs:
        inputs["token_type_ids"] = longer("token_type_ids", 0)
    if inputs["labels"].dim() == 2 and not both:
        labels = inputs["labels"].clone()
        labels[:, 0] = -100 if base.can_generate() else labels[:, 0]  # the base wouldn't predict it either
        inputs["labels"] = torch.cat([labels.new_full((len(labels), count), -100), labels], 1)
    elif not both:
        end = getattr(body, "encoder", getattr(body, "transformer", body))
        handles.append(end.register_forward_hook(cut))
    yield inputs
    for handle in handles:
        handle.remove()


@contextlib.contextmanager
def _prefixed(
    base: Any, prefix: Tensor, batch: Mapping[str, Any], gates: Mapping[str, Any], method: Any
) -> Iterator[None]:
    """A prefix by hand: the body goes on from a cache that holds it, as if its words had been read before.

    gates: what weighs it, by the attentions' names in their order; written into the cache when its layer is reached.
    """
    reached: list[Any] = []
    both = base.config.is_encoder_decoder
    body, config = base.get_decoder() if both else base.base_model, base.config.get_text_config(decoder=True)
    body = getattr(body, "decoder", body)  # OPT's
    heads = config.num_attention_heads
    if base.can_generate() and not both:  # it may share keys and values between heads
        with torch.no_grad():
            held = base(**batch, use_cache=True)
        held = held["cache" if "cache" in held.keys() else "past_key_values"]  # noqa: SIM118 (`in` knows old names)
        heads = held.layers[0].keys.shape[1]
    count, layers = len(prefix), getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    rows = prefix.view(count, layers, 2, heads, -1).permute(1, 2, 3, 0, 4)

    def go_on(module: Any, args: Any, kwargs: Any) -> Any:
        texts = args[0] if args else kwargs.get("input_ids")
        filled = hf.DynamicCache([tuple(x.expand(len(texts), -1, -1, -1) for x in layer) for layer in rows])
        name = next(
            key for key in ("cache", "past_key_values") if key in inspect.signature(module.forward).parameters
        )
        mask = kwargs.get("attention_mask")
        if mask is not None:
            kwargs["attention_mask"] = torch.cat([mask.new_ones(len(mask), count), mask], 1)
        reached[:] = filled.layers
        return args, kwargs | {name: hf.EncoderDecoderCache(filled, hf.DynamicCache()) if both else filled}

    def weigh(w: Mapping[str, Tensor], layer: int, module: Any, args: Any, kwargs: Any) -> None:
        g = _mean_gate(w, args[0] if args else kwargs["hidden_states"], batch, method)[:, :1, :, None]
        reached[layer].keys, reached[layer].values = reached[layer].keys * g, reached[layer].values * g

    handles = [body.register_forward_pre_hook(go_on, with_kwargs=True)]
    for layer, (path, w) in enumerate(p for p in gates.items() if "gate_weight" in p[1]):
        hook = functools.partial(weigh, w, layer)
        handles.append(base.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
    yield
    for handle in handles:
        handle.remove()


@contextlib.contextmanager
def _beside_a_ladder(
    base: Any, ladder: Mapping[str, Any], batch: Mapping[str, Any], method: Any
) -> Iterator[None]:
    """A ladder by hand: a whole model of the same class, but narrow, reads the batch with positions, masks and angles
    of its own; before each of its blocks stands what the base's block said. Of what sees and reads, only what reads."""
    if not ladder:
        yield
        return
    path = blocks(base)[0]
    around, stack = path.rpartition(".")[0], path.rpartition(".")[2]
    config, alone = copy.deepcopy(base.config), base.config.get_text_config() is not base.config
    for name, value in vars(config.get_text_config()).items():
        if name in _WIDTHS and isinstance(value, int):
            setattr(config.get_text_config(), name, value // method.reduction)
    body = base.get_submodule(around)
    narrow = type(body if alone else base)(config.get_text_config() if alone else config).eval()
    inside, h, given, spoken = narrow if alone else narrow.get_submodule(around), {}, {}, []
    own = dict((body if alone else base).named_parameters())
    for (
        name,
        p,
    ) in narrow.named_parameters():  # what has no width, as a table of relative positions, is the base's
        if p.shape == own[name].shape:
            p.data.copy_(own[name])

    def read(key: int, block: Any, args: Any, output: Any) -> None:
        h[key] = (output[0] if isinstance(output, tuple) else output).detach()

    def enter(block: Any, args: Any, kwargs: Any) -> None:
        h[-1] = (args[0] if args else kwargs["hidden_states"]).detach()

    def down(place: str, which: str, x: Tensor) -> Tensor:
        return x @ ladder[place][f"{which}_weight"].t() + ladder[place][f"{which}_bias"]

    def climb(i: int, block: Any, args: Any, kwargs: Any) -> Any:
        s = (args[0] if args else kwargs["hidden_states"]) if i else down(around, "first", h[-1])
        gate = (10 * ladder[f"{path}.{i}"]["gate"]).sigmoid()
        s = gate * s + (1 - gate) * down(f"{path}.{i}", "read", h[i])
        return ((s, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": s})

    def speak(module: Any, args: Any, output: Any) -> Any:
        said = spoken[0] @ ladder[around]["up_weight"].t() + ladder[around]["up_bias"]
        if isinstance(output, tuple):
            return (said, *output[1:])
        output.last_hidden_state = said
        return output

    handles = [
        block.register_forward_hook(functools.partial(read, i)) for i, block in enumerate(blocks(base)[1])
    ]
    handles.append(blocks(base)[1][0].register_forward_pre_hook(enter, with_kwargs=True))
    note = body.register_forward_pre_hook(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True)
    handles.append(note)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        base(**inputs)
    for handle in handles:
        handle.remove()
    for i, block in enumerate(getattr(inside, stack)):
        block.register_forward_pre_hook(functools.partial(climb, i), with_kwargs=True)
    inside.register_forward_hook(lambda module, args, output: spoken.append(output[0]))
    weights, known = {}, sorted(ladder, key=len, reverse=True)
    for name in dict(narrow.named_parameters()):
        full = f"{around}.{name}" if alone else name
        place = next((p for p in known if full.startswith(f"{p}.")), "")
        key = full.removeprefix(f"{place}.").replace(".", "_")
        if key in ladder.get(place, {}):
            weights[name] = ladder[place][key]
    used = {id(t) for t in weights.values()}
    left = [k for p, w in ladder.items() for k, t in w.items() if id(t) not in used]
    assert all(k.startswith(("read_", "first_", "up_", "gate")) for k in left), left
    if alone:
        inputs = given | {"inputs_embeds": given["inputs_embeds"][..., :: method.reduction]}
    torch.func.functional_call(narrow, weights, args=(), kwargs=inputs)
    handle = body.register_forward_hook(speak)
    yield
    handle.remove()


_WIDTHS = (
    "hidden_size", "d_model", "n_embd", "dim", "head_dim", "rotary_dim", "intermediate_size", "ffn_dim", "n_inner",
    "ffn_hidden_size", "hidden_dim", "word_embed_proj_dim", "moe_intermediate_size",
)  # fmt: skip


def right_gradients(model: nn.Module, base: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Dense autograd of the base's own loss, by the name that is saved; zero where nothing leads to the loss."""
    by_hand, inputs = (
        ByHand.of(model, base),
        dict(batch) if "labels" in batch else {**batch, "return_loss": True},
    )
    method = its_own(model).method
    with contextlib.ExitStack() as stack:
        stack.enter_context(_special(base, by_hand.vectors, batch, method))
        stack.enter_context(_coupled(base, _by_layer(by_hand.leaves, "invertible_")))
        stack.enter_context(_over_embeddings(base, _by_layer(by_hand.leaves, "embedding_")))
        stack.enter_context(_adapters(base, by_hand.adapters, method, batch))
        stack.enter_context(_gated(base, by_hand.leaves, batch, method))
        stack.enter_context(_with_prompts(base, by_hand.prompts))
        stack.enter_context(_fusions(base, by_hand.fusions, by_hand.fused))
        ladder = _by_layer(by_hand.leaves, "lst_")
        stack.enter_context(_beside_a_ladder(base, ladder, inputs, method))
        if by_hand.prompt is not None:
            inputs = stack.enter_context(_prompted(base, by_hand.prompt, inputs))
        if by_hand.prefix is not None:
            gates = _by_layer(by_hand.leaves, "prefix_")
            stack.enter_context(_prefixed(base, by_hand.prefix, batch, gates, method))
        loss = torch.func.functional_call(base, by_hand.weights, args=(), kwargs=inputs).loss
    leaves = by_hand.leaves
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """What trains, by the name it is saved under, and its gradient."""
    attachment = its_own(model)
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: p.grad for p in attachment.trained() if p.requires_grad}


# ---- the checks


class NotApplicable(Exception):
    """The base itself can't do it."""


def needs_training(cell: Cell) -> None:
    if cell.method in TRAINS_NOTHING:
        raise NotApplicable("nothing trains")


def mark_of(failing: Iterable[str]) -> str:
    return f"**fails**: {', '.join(failing)}"


@dataclass
class Cell:
    """One method on one architecture, and what was found. refused: the message, if attaching was refused."""

    architecture: str
    method: str
    refused: str | None = None
    problems: dict[str, str] = field(default_factory=dict)  # by check
    left_out: dict[str, str] = field(default_factory=dict)  # by check, with the reason

    @property
    def kind(self) -> Architecture:
        return ARCHITECTURES[self.architecture]

    @property
    def mark(self) -> str:
        if self.problems:
            return mark_of(self.problems)
        return "✓" if self.refused is None else "refused"

    def batch(self) -> dict[str, Tensor]:
        return BATCHES[self.kind.batch]()

    def attach(self, model: Any) -> None:
        given = set_up(self.method, self.kind, model)
        half = next(model.parameters()).dtype == torch.bfloat16
        sources = [
            [in_half(row) for row in source] if half and isinstance(source, list) else source
            for source in given.sources
        ]
        given.before(model)
        given.method.attach(model, *sources)
        given.prepare(model, given.method)

    def prepared(self) -> Any:
        """The base, with what it must carry before."""
        model = self.kind.build()
        set_up(self.method, self.kind, model).before(model)
        return model


def run(architecture: str, method: str) -> Cell:
    """All checks of one cell, each on what the one before has left: a trained model, a saved one, a merged one."""
    cell = Cell(architecture, method)
    model = cell.kind.build()
    before = Form.of(model)
    try:
        cell.attach(model)
    except ValueError as error:
        cell.refused = str(error)
        _note(cell, "unchanged", lambda: before.check(model))
        return cell
    except Exception as error:
        cell.problems["attach"] = f"{type(error).__name__}: {error}"
        return cell
    for name, check in CHECKS.items():
        _note(cell, name, functools.partial(check, cell, model))
    return cell


def _note(cell: Cell, name: str, check: Callable[[], None]) -> None:
    try:
        check()
    except NotApplicable as error:
        cell.left_out[name] = str(error)
    except Exception as error:
        cell.problems[name] = f"{type(error).__name__}: {error}"


def check_start(cell: Cell, model: Any) -> None:
    if why := starts_otherwise(cell.method, its_own(model).method):
        raise NotApplicable(why)
    base, batch = cell.kind.build(), cell.batch()
    for key, value in said(base, batch).items():
        assert torch.allclose(value, said(model, batch)[key], atol=1e-6, equal_nan=True), (
            f"{key} differs at the start"
        )


def check_sum(cell: Cell, model: Any) -> None:
    """What proxies add: the formula, from three plain models."""
    if cell.method != "ProxyTuning":
        raise NotApplicable("it adds no other models' logits")
    base, batch = cell.kind.build(), {key: v for key, v in cell.batch().items() if key != "labels"}
    given = set_up(cell.method, cell.kind, base)
    s, plus, minus = (said(one, batch)["logits"] for one in (base, *given.sources))
    expected = s + given.method.alpha * (plus - minus)
    assert torch.allclose(said(model, batch)["logits"], expected, atol=1e-5), "it isn't the formula"
    assert not torch.allclose(s, expected, atol=1e-3), "the experts say the same, which proves nothing"


def check_gradient(cell: Cell, model: Any) -> None:
    needs_training(cell)
    spread(model)
    batch = cell.batch()
    loss_of(model, batch).backward()
    found = gradients(model)
    right = right_gradients(model, cell.kind.build(), batch)
    largest = max(g.abs().max() for g in right.values() if g.numel())
    assert found, "nothing trains"
    assert largest > 0, "nothing gets a gradient"
    wrong = []
    for name, g in found.items():
        error = right[name] - (0 if g is None else g)
        if not float(error.norm()) <= 2e-4 * float(right[name].norm()) + 1e-5 * float(largest):
            wrong.append(
                f"{name}: off by {error.norm():.3g} of {right[name].norm():.3g}"
                + (" (None)" if g is None else "")
            )
    assert not wrong, f"{len(wrong)} of {len(found)} gradients: {'; '.join(wrong[:3])}"


def check_autocast(cell: Cell, model: Any) -> None:
    needs_training(cell)
    batch = cell.batch()
    if why := _works(cell.architecture, "autocast"):
        raise NotApplicable(f"the base itself fails: {why}")
    exact = {n: g for n, g in gradients(model).items() if g is not None}
    for training in (True, False):
        model.train(training).zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
            loss.backward()
        rounded = gradients(model)
        _check_finite(loss, rounded, {} if training else exact)
    model.zero_grad()
    one, other = (torch.cat([g[n].flatten() for n in exact]) for g in (exact, rounded))
    alike = torch.cosine_similarity(one, other, dim=0)
    assert alike > 0.9, f"under autocast the gradient points elsewhere: cosine {alike:.3f}"


def _check_finite(loss: Tensor, found: Mapping[str, Tensor | None], needed: Mapping[str, Any]) -> None:
    assert loss.isfinite(), f"the loss is {loss.item()}"
    missing = [n for n in needed if found.get(n) is None]
    assert not missing, f"no gradient for {missing[:3]} ({len(missing)})"
    bad = [n for n, g in found.items() if g is not None and not g.isfinite().all()]
    assert not bad, f"a gradient isn't finite: {bad[:3]}"


@functools.cache
def _works(architecture: str, how: str) -> str | None:
    """Why the base itself can't do something, or None."""
    kind = ARCHITECTURES[architecture]
    model, batch = kind.build(), BATCHES[kind.batch]()
    try:
        if how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                loss_of(model, batch).backward()
        else:
            loss_of(model.bfloat16(), in_half(batch)).backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def in_half(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}


def check_bfloat16(cell: Cell, model: Any) -> None:
    needs_training(cell)
    if why := _works(cell.architecture, "bfloat16"):
        raise NotApplicable(f"the base itself fails: {why}")
    half = cell.kind.build().bfloat16()
    cell.attach(half)
    spread(half)
    half.train()
    torch.manual_seed(0)
    loss = loss_of(half, in_half(cell.batch()))
    loss.backward()
    _check_finite(loss, gradients(half), {})
    assert any(g is not None and g.any() for g in gradients(half).values()), "nothing gets a gradient"


def check_generation(cell: Cell, model: Any) -> None:
    if not cell.kind.generates:
        raise NotApplicable("no generation")
    if why := _no_cache(cell.architecture):
        raise NotApplicable(why)
    one, other = (generated(model, cell, use_cache=use) for use in (False, True))
    _check_alike(one, other)


@functools.cache
def _no_cache(architecture: str) -> str | None:
    cell = Cell(architecture, "")
    try:
        _check_alike(*(generated(cell.kind.build(), cell, use_cache=use) for use in (False, True)))
    except Exception as error:
        return f"the base itself: {type(error).__name__}: {error}"
    return None


def generated(model: Any, cell: Cell, *, use_cache: bool) -> Any:
    row = {key: value[:1] for key, value in cell.batch().items() if key != "labels"}
    return model.generate(
        **row, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=1, use_cache=use_cache,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip


def _check_alike(one: Any, other: Any) -> None:
    for i, (a, b) in enumerate(zip(one.scores, other.scores, strict=True)):
        difference = (a - b).nan_to_num(0, 0, 0).abs().max()
        assert difference < 1e-3, f"token {i} of 4: scores differ by {difference:.3g} with a cache"
    assert torch.equal(one.sequences, other.sequences)


def check_frozen(cell: Cell, model: Any) -> None:
    """A real run of `fit` with weight decay: only what is saved may have changed, and that has."""
    needs_training(cell)
    before = Form.of(cell.prepared()).tensors
    rows = rows_of(cell.batch())
    right = right_gradients(model, cell.kind.build(), cell.batch())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pefttutor.fit(
            model, rows, steps=2, batch_size=3, lr=1e-2, weight_decay=0.1, warmup=0.0, progress=False,
            loss=None if "labels" in rows[0] else loss_of,
        )  # fmt: skip
    saved = its_own(model).tensors(model)
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, was in before.items():
        if name in saved:
            continue
        tensor = now[name].detach()
        if f"{name}_index" in saved and f"{name}_values" in saved:
            outside = torch.ones(was.numel(), dtype=torch.bool)
            outside[saved[f"{name}_index"].long()] = False
            assert same_bits(was.flatten()[outside], tensor.flatten()[outside]), (
                f"{name} changed outside the choice"
            )
            assert same_bits(tensor.flatten()[~outside], saved[f"{name}_values"]), (
                f"{name} holds other values"
            )
        else:
            assert same_bits(was, tensor), f"{name} is frozen and changed"
    told = [str(w.message) for w in caught]
    for message in told:
        if "got no gradient" not in message:
            raise AssertionError(f"fit warns: {message}")
        for name in re.findall(r"'([^']+)'", message.split(": should train")[0]):
            assert not right.get(name, torch.ones(1)).any(), (
                f"fit warns of {name}, which has a gradient: {message}"
            )


def check_saving(cell: Cell, model: Any) -> None:
    needs_training(cell)
    with tempfile.TemporaryDirectory() as folder:
        pefttutor.save(model, folder, name="default")
        again = pefttutor.load(cell.prepared(), folder)
    batch = cell.batch()
    here, there = said(model, batch), said(again, batch)
    differ = [
        key
        for key, value in here.items()
        if not torch.allclose(value, there[key], atol=0, rtol=0, equal_nan=True)
    ]
    assert not differ, (
        f"after loading {differ} differ, by {(here[differ[0]] - there[differ[0]]).abs().max():.3g}"
    )


def check_merging(cell: Cell, model: Any) -> None:
    batch = cell.batch()
    before, form = said(model, batch), Form.of(model)
    try:
        pefttutor.merge(model)
    except ValueError:
        form.check(model)
        if (cell.method, "merge") in CANNOT:  # what it adds, no weight can hold
            raise NotApplicable("no weight can hold it") from None
        raise
    after = said(model, batch)
    pefttutor.unmerge(model)
    for key, value in before.items():
        scale = float(value.abs().nan_to_num(0, 0, 0).max())
        off = float((value - after[key]).nan_to_num(0, 0, 0).abs().max())
        assert off <= 2e-5 * max(scale, 1), f"merged, {key} differs by {off:.3g}"
    now = Form.of(model)
    changed = [n for n, t in form.tensors.items() if not same_bits(t, now.tensors[n])]
    assert not changed, f"after unmerging other bits in {changed[:3]}"


def check_detach(cell: Cell, model: Any) -> None:
    model.zero_grad()
    pefttutor.detach(model)
    base = cell.kind.build()
    said(base, cell.batch())  # some models note things on themselves when they run
    Form.of(base).check(model)


CHECKS: dict[str, Callable[[Cell, Any], None]] = {
    "starts as the base": check_start,
    "the sum of three": check_sum,
    "gradients": check_gradient,
    "autocast": check_autocast,
    "bfloat16": check_bfloat16,
    "generation with a cache": check_generation,
    "the frozen stay": check_frozen,
    "save and load": check_saving,
    "merging": check_merging,
    "detach": check_detach,
}


# ---- what may be refused, and in which words

_NO_BIAS = ("Mistral", "Qwen3", "Gemma2", "Gemma3", "Phi3", "MPT", "Cohere", "OLMo", "OLMo2", "Granite", "T5",
            "Mixtral", "Switch")  # fmt: skip
_TWO_TEXTS = ("T5", "BART", "mBART", "Pegasus", "Marian", "Switch")
_NO_TOKENS = ("Whisper", "ViT", "Swin", "ConvNeXt", "BEiT", "DINOv2", "ResNet", "Wav2Vec2", "HuBERT",
              "Whisper, encoder")  # fmt: skip
_OTHER_NAMES = (  # or several in one layer, or no attention
    "Phi3", "GPT-2", "GPT-NeoX", "GPT-J", "GPT-Neo", "OPT", "BLOOM", "Falcon", "MPT", "BERT", "RoBERTa", "DistilBERT",
    "ALBERT", "ELECTRA", "DeBERTa-v2", "MPNet", "XLNet", "ModernBERT", "BERT, masked words", "T5", "BART", "mBART",
    "Pegasus", "Marian", "Whisper", "Mamba", "Mamba2", "Switch", "ConvNeXt", "ResNet", "Wav2Vec2", "HuBERT",
    "Whisper, encoder", "CLIP",
)  # fmt: skip
_NO_LABELS = r"needs labels, and an example has only input_ids, .*give log_likelihood="
_NOT_LINEAR = r"'[\w.]+' can't be adapted: it is a Conv2d, not.*It has: "
_NO_TEXT = {
    r"before a text's tokens, and a \w+ has none: it reads (pixel|input)_(values|features)\.": _NO_TOKENS,
    r"before a text's tokens, and a CLIPModel has none that it tells of": ("CLIP",),
    r"take \(batch, seq, d\); those of a \w+ get .* can't be said which token is which": ("XLNet",),
}
_NO_PREFIX = {
    r"keys and values, and a \w+ takes no cache of these.*PromptTuning puts": (
        "DistilBERT",
        "ALBERT",
        "DeBERTa-v2",
        "MPNet",
        "ModernBERT",
    ),
    r"of one shape in every layer, and of the 2 layers of a \w+ [01] give some.*PromptTuning puts": (
        "Mamba",
        "Mamba2",
        "Bamba",
        "Jamba",
    ),
    **_NO_TEXT,
}

# By method: the message's pattern, and for which architectures.
REFUSED: dict[str, dict[str, tuple[str, ...]]] = {
    "BitFit": {r"this model has no bias.*Take LayerNormTuning, LoRA, or": _NO_BIAS},
    "PASTA": {
        r"reads one text, and a \w+ has two; take an encoder or a decoder alone": _TWO_TEXTS,
        r"adds to special tokens, and a \w+ has none: it reads (pixel|input)_(values|features)\.": _NO_TOKENS,
        r"adds to special tokens, and a CLIPModel has none that it tells of": ("CLIP",),
        r"take \(batch, seq, d\); those of a \w+ get .* can't be said which token is which": ("XLNet",),
    },
    **{name: _NO_TEXT for name in ("PTuning", "PromptTuning")},
    **{name: _NO_PREFIX for name in ("MAM", "PrefixTuning")},
    "CIAT": {
        r"what goes in for a text's tokens, and a \w+ has none: it reads (pixel|input)_(values|features)\.": _NO_TOKENS,
        r"what goes in for a text's tokens, and a CLIPModel has none that it tells of": ("CLIP",),
        r"first block of a \w+, '[\w.]+', is called 2 times for a text\. Adapter changes": ("ALBERT",),
    },
    "InvertibleAdapter": {
        r"what goes in for a text's tokens, and a \w+ has none: it reads (pixel|input)_(values|features)\.": _NO_TOKENS,
        r"what goes in for a text's tokens, and a CLIPModel has none that it tells of": ("CLIP",),
        r"first block of a \w+, '[\w.]+', is called 2 times for a text\. Adapter changes": ("ALBERT",),
        r"embeddings as wide as the blocks, and those of this \w+ read \[12\] .*attach it to the body": (
            "OPT",
        ),
    },
    "UniPELT": {
        _NOT_LINEAR: ("ResNet",),
        r"means over a text's tokens, and a CLIPModel has none that it tells of": ("CLIP",),
        r"take \(batch, seq, d\); those of a \w+ get .* can't be said which token is which": ("XLNet",),
    },
    "LLaMAAdapter": {
        r"linear layers q_proj, k_proj, v_proj, o_proj, .* in a \w+ there is none. PrefixTuning puts": _OTHER_NAMES,
        r"'[\w.]+' of this \w+ computes something else \((another rotation\?|it has a parameter '[\w.]+')\)": (
            "Cohere",
            "BEiT",
            "Swin",
        ),
    },
    "LST": {
        r"beside one stack of blocks, and of this \w+ .*: it has an encoder and a decoder": (
            *_TWO_TEXTS,
            "Whisper",
            "Whisper, encoder",
        ),
        r"beside one stack .*: a (Linear|BeitPooler) reads what the blocks give": ("OPT", "BEiT"),
        r"beside one stack .*: its blocks aren't called once each": ("ALBERT",),
        r"beside one stack .*: its blocks get hidden states of the shapes": ("XLNet", "Swin", "ConvNeXt"),
        r"beside one stack .*: it can't be tried": ("ResNet", "Wav2Vec2", "HuBERT", "CLIP"),
        r"can't be called in narrow \(\w+: reduction is 2; .* of the 2 features": (
            "GPT-NeoX",
            "GPT-J",
            "StableLM",
        ),
        r"can't be called in narrow \(\w+: the features that .* half a head apart": ("Cohere",),
        r"can't be called in narrow \(\w+: mat1 and mat2": ("DeBERTa-v2",),
        r"'[\w.]+conv1d.weight' is .* in one with widths divided by 2": ("Mamba2", "Bamba"),
    },
    "LayerNormTuning": {r"no LayerNorm or RMSNorm with weights of its own among": ("OLMo", "ResNet")},
    **{
        name: {_NOT_LINEAR: ("ResNet",)}
        for name in (
            "AdaLoRA",
            "AdaMix",
            "Adapter",
            "AdapterBias",
            "AdapterFusion",
            "COLA",
            "Compacter",
            "DeltaLoRA",
            "DynamicDoRA",
            "IA3",
            "IncreLoRA",
            "LoRA",
            "LoRAHub",
            "MPO",
            "ReLoRA",
            "SparseAdapter",
            *LIKE_LORA,
        )
    },
    "ProxyTuning": {
        r"steers what a causal language model writes next, and a \w+ isn't one": tuple(
            name for name, kind in ARCHITECTURES.items() if not kind.generates
        ),
        r"steers what a causal language model writes next, and a \w+ has an encoder": (
            *_TWO_TEXTS,
            "Whisper",
        ),
    },
    **{name: {_NO_LABELS: ("CLIP",)} for name in ("ChildTuningD", "FishDip", "FishMask", "SecondOrderMask")},
}

# Known faults, by cell: the checks that fail, and why.
REPORTED: dict[tuple[str, str], dict[str, str]] = {}


def declared(architecture: str, method: str) -> str | None:
    """The pattern of the refusal that is expected, or None."""
    patterns = REFUSED.get(method, {}).items()
    return next((pattern for pattern, where in patterns if architecture in where), None)


# ---- which cells run in CI: three methods everywhere, and all methods where each check is met by each family

EVERYWHERE = ("LoRA", "SparseFineTuning", "BitFit")
REPRESENTATIVE = ("Qwen2", "GPT-2", "DeBERTa-v2", "T5", "Mamba", "Qwen2-MoE", "Swin", "HuBERT", "LLaVA")


def _cells() -> Iterator[Any]:
    for architecture in ARCHITECTURES:
        for method in NAMES:
            in_slice = method in EVERYWHERE or architecture in REPRESENTATIVE
            marks = () if in_slice else (pytest.mark.architectures,)
            yield pytest.param(architecture, method, marks=marks, id=f"{architecture}-{method}")


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """The models are so small that threads would only wait for each other."""
    set_threads(1)


# The router of Switch casts its own weights whenever it runs, and for that torch looks at the .grad of computed ones.
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning:torch.nn.modules.module"
)
@pytest.mark.parametrize(("architecture", "method"), list(_cells()))
def test_it_holds_or_is_refused_in_words_that_help(architecture: str, method: str) -> None:
    cell = run(architecture, method)
    pattern = declared(architecture, method)
    assert set(cell.problems) == set(REPORTED.get((architecture, method), ())), cell.problems
    assert (cell.refused is None) == (pattern is None), cell.refused
    assert pattern is None or re.search(pattern, cell.refused or "", re.DOTALL), cell.refused


@pytest.mark.parametrize("architecture", [name for name, kind in ARCHITECTURES.items() if kind.past])
@pytest.mark.parametrize("method", ["SparseFineTuning", "DiffPruning", "Masking"])
def test_a_weight_that_is_read_past_its_layer_is_refused(architecture: str, method: str) -> None:
    kind = ARCHITECTURES[architecture]
    model = kind.build()
    before = Form.of(model)
    given = set_up(method, replace(kind, past=()), model)
    with pytest.raises(ValueError, match=r"is read without calling its layer.*modules_to_save=\('\w+',\)"):
        given.method.attach(model, *given.sources)
    before.check(model)


def test_the_zoo_is_large_enough() -> None:
    families = [kind.family for kind in ARCHITECTURES.values()]
    assert len(families) >= 36
    assert {ARCHITECTURES[name].family for name in REPRESENTATIVE} == set(FAMILIES) == set(families)


def test_the_published_table_has_every_architecture_and_method() -> None:
    text = (Path(__file__).parent.parent / ".github" / "architectures.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[1:] for row in rows if row[0] not in ARCHITECTURES] == [list(NAMES)] * len(FAMILIES)
    marks = {
        (row[0], name): mark
        for row in rows
        if row[0] in ARCHITECTURES
        for name, mark in zip(NAMES, row[1:], strict=True)
    }
    expected = {
        (a, m): mark_of(REPORTED[a, m]) if (a, m) in REPORTED else "refused" if declared(a, m) else "✓"
        for a in ARCHITECTURES
        for m in NAMES
    }
    assert marks == expected, "run: python -m tests.architectures"
