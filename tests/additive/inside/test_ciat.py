"""CIAT against its formula in hooks of our own, and its count, places and errors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pefttutor import CIAT, attached, detach, load, save, trainable
from tests.cases import answer, base_answer, batch_of, fresh, loss_of, moved
from tests.memory.models import assert_estimate_is_measured, held
from tests.memory.models import batch_of as batch_for_memory
from tests.pictures import differences, picture
from tests.tiny import tiny_batch, tiny_model

F64 = torch.float64
EXACT = {"rtol": 1e-9, "atol": 1e-11}
EMBEDS = {  # what gives what the first block gets, for each stack
    "llama": {"model.layers.0": "model.embed_tokens"},
    "gpt2": {"transformer.h.0": "transformer.drop"},
    "bert": {"bert.encoder.layer.0": "bert.embeddings"},
    "t5": {"encoder.block.0": "encoder", "decoder.block.0": "decoder"},
}
READS = {  # by the end of a sublayer, what reads its input
    "llama": {"self_attn.o_proj": "self_attn.q_proj", "mlp.down_proj": "mlp.gate_proj"},
    "gpt2": {"attn.c_proj": "attn.c_attn", "mlp.c_proj": "mlp.c_fc"},
    "bert": {"attention.output.dense": "attention.self.query", "output.dense": "intermediate.dense"},
    "t5": {"SelfAttention.o": "SelfAttention.q", "DenseReluDense.wo": "DenseReluDense.wi"},
}


def by_hand(kind: str, leaves: dict[str, Tensor]) -> nn.Module:
    """The base with hooks; the norm is written out."""
    base = tiny_model(kind, dtype=F64)

    def of(path: str, which: str) -> dict[str, Tensor]:
        start = f"{path}.{which}_"
        return {name.removeprefix(start): leaf for name, leaf in leaves.items() if name.startswith(start)}

    def branch(w: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.relu(x @ w["down"].mT + w["down_bias"]) @ w["up"].mT + w["up_bias"]

    def embedded(w, x):
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x + branch(w, normed * w["norm"] + w["norm_bias"])

    for first, path in EMBEDS[kind].items():
        w = of(first, "embedding")
        if kind == "t5":  # both stacks share one table: each first block is hooked itself
            base.get_submodule(first).register_forward_pre_hook(
                lambda _, args, kwargs, w=w: ((embedded(w, args[0]), *args[1:]), kwargs), with_kwargs=True
            )
        else:
            base.get_submodule(path).register_forward_hook(lambda _, args, x, w=w: embedded(w, x))
    for path in {name.rpartition(".")[0] for name in leaves if ".adapter_" in name}:
        end = next(end for end in sorted(READS[kind], key=len, reverse=True) if path.endswith(end))
        reads, seen, w = path.removesuffix(end) + READS[kind][end], [], of(path, "adapter")
        base.get_submodule(reads).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        base.get_submodule(path).register_forward_hook(
            lambda _, args, y, w=w, seen=seen: y + branch(w, seen.pop())
        )
    return base


@pytest.mark.parametrize("kind", EMBEDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_outputs_and_every_gradient_are_those_of_the_formula(kind, side):
    ours = moved(CIAT(bottleneck=5, embedding_bottleneck=4).attach(tiny_model(kind, dtype=F64)))
    batch = tiny_batch(kind, side=side, dtype=F64)
    inputs = batch if kind == "bert" else batch | {"labels": batch["input_ids"]}
    leaves = {n: p.detach().clone().requires_grad_() for n, p in ours.named_parameters() if p.requires_grad}
    stacks = len(EMBEDS[kind])
    assert len(leaves) == 6 * stacks + 4 * 4 * stacks  # two blocks, two sublayers each
    base = by_hand(kind, leaves)
    torch.testing.assert_close(answer(ours, inputs), answer(base, inputs), **EXACT)
    expected = torch.autograd.grad(loss_of(base, inputs), list(leaves.values()))
    found = torch.autograd.grad(loss_of(ours, inputs), [ours.get_parameter(name) for name in leaves])
    for name, one, other in zip(leaves, found, expected, strict=True):
        assert one.abs().max() > 1e-9, f"{name}: a gradient of zero would prove nothing"
        torch.testing.assert_close(one, other, **EXACT, msg=name)


@pytest.mark.parametrize("kind", EMBEDS)
def test_at_the_start_it_is_the_base_and_by_default_half_as_wide(kind):
    model, method = fresh(kind), CIAT()
    count = method.count(model)
    method.attach(model)
    torch.testing.assert_close(answer(model, batch_of(kind)), base_answer(kind), rtol=0, atol=0)
    assert sum(trainable(model).values()) == count
    d = model.get_input_embeddings().weight.shape[1]
    down = [p for n, p in model.named_parameters() if n.endswith("_down")]
    assert {tuple(p.shape) for p in down} == {(d // 2, d)}


def test_named_layers_stand_for_those_of_a_trial():
    model = tiny_model("llama", dtype=F64)
    named = CIAT(bottleneck=5, adapter_modules=("o_proj", "down_proj"), input_modules=("q_proj", "gate_proj"))
    one, other = (moved(m.attach(copy.deepcopy(model))) for m in (CIAT(bottleneck=5), named))
    inputs = tiny_batch("llama", dtype=F64)
    assert torch.equal(answer(one, inputs), answer(other, inputs))


def test_a_file_carries_it_to_another_base(tmp_path):
    model = moved(CIAT(bottleneck=5).attach(fresh("t5")))
    save(model, tmp_path)
    again = load(fresh("t5"), tmp_path)
    assert attached(again)["default"].method == CIAT(bottleneck=5)
    assert torch.equal(answer(again, batch_of("t5")), answer(model, batch_of("t5")))
    before = picture(fresh("t5"))
    assert [
        d for d in differences(before, picture(detach(again))) if "object" not in d and d != "config"
    ] == []


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"bottleneck": 25}, "bottleneck is 25, but .* gives 24 features"),
        ({"embedding_bottleneck": 25}, "embedding_bottleneck is 25, but 'model.layers.0' reads 24 features"),
        ({"adapter_modules": ("nothing",), "input_modules": ("q_proj",)}, "adapter_modules: .*nothing"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_the_model(settings, why):
    model = fresh("llama")
    before = picture(model)
    with pytest.raises(ValueError, match=why):
        CIAT(**settings).attach(model)
    assert differences(before, picture(model)) == []


def test_names_without_what_they_read_are_refused():
    with pytest.raises(ValueError, match="adapter_modules says beside which layers adapters stand"):
        CIAT(adapter_modules=("o_proj",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_the_estimate_is_what_is_measured(kind, dtype):
    """To the byte but for a BERT's pooled row; also in bfloat16, where the norm's and the projections' copies count."""
    method = CIAT(bottleneck=6, embedding_bottleneck=5)
    estimated, model = assert_estimate_is_measured(kind, method, dtype)
    measured = held(model, batch_for_memory(kind, 2, 24, dtype))
    assert sum(estimated.activations.values()) == pytest.approx(measured, rel=1e-5)
