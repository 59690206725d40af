"""VeRA against HF PEFT with the same A, B and vectors; the bits of A and B; what a file holds."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import VeraConfig
from safetensors.torch import load_file
from torch import nn

from pefttutor import VeRA, attached, detach, load, save
from pefttutor.parts.drawing import drawn_again
from tests.lowrank.peers import assert_same_as_peft, drawn
from tests.memory.models import assert_estimate_is_measured
from tests.pictures import differences, picture

F64, BF16 = torch.float64, torch.bfloat16


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama", ("q_proj", "v_proj", "down_proj")),
        ("gpt2", ("c_attn", "c_fc")),
        ("bert", ("query", "dense")),
    ],
)
def test_outputs_and_every_gradient_are_those_of_peft(tiny, batch, kind, names, dropout):
    """Of layers of several sizes, so that A and B are sliced."""
    ours = VeRA(r=30, d_initial=0.3, target_modules=names, vera_dropout=dropout)
    config = VeraConfig(
        r=30, target_modules=list(names), vera_dropout=dropout, d_initial=0.3, fan_in_fan_out=kind == "gpt2"
    )  # fmt: skip
    base = tiny(kind, dtype=F64)
    adapted = ours.attach(copy.deepcopy(base))

    def same_projections(theirs):
        for key, own in (("vera_A", adapted.vera_A), ("vera_B", adapted.vera_B)):
            other = getattr(theirs.base_model, key)["default"]
            assert other.shape == own.shape
            other.data = own.clone()
            for module in theirs.modules():
                if hasattr(module, "vera_lambda_d") and hasattr(module, key):
                    assert getattr(module, key)["default"] is other

    inputs = batch(kind, side="left" if dropout else "right", dtype=F64)
    assert_same_as_peft(base, ours, config, inputs, train=dropout > 0, prepare=same_projections)


def test_the_published_count():
    """RoBERTa-base, queries and values, r = 1024."""
    with torch.device("meta"):
        model = nn.ModuleList(nn.ModuleDict({n: nn.Linear(768, 768) for n in ("q", "v")}) for _ in range(12))
    assert VeRA(r=1024, target_modules=("q", "v")).count(model) == 43_008


# ---- A and B


def test_the_generator_gives_the_published_known_answer():
    """Random123's vector for Philox-4x64-10 with a key and counter of zeros; numpy counts up before it gives."""
    known = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert np.random.Philox(key=0, counter=2**256 - 1).random_raw(4).tolist() == known
    raw = np.random.Philox(key=5, counter=3 << 192).random_raw(6)
    expected = [[(int(value) >> 40) / 2**24 for value in row] for row in raw.reshape(2, 3)]
    assert drawn_again((2, 3), key=5, stream=3).tolist() == expected


def test_a_and_b_are_drawn_once_for_all_and_kaiming_uniform():
    model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 250))
    VeRA(r=400, target_modules=("0", "1")).attach(model)
    assert [(n, tuple(b.shape)) for n, b in model.named_buffers()] == [
        ("vera_A", (400, 300)),
        ("vera_B", (250, 400)),
    ]
    for matrix in (model.vera_A, model.vera_B):
        bound = (6 / matrix.shape[1]) ** 0.5
        assert 0.999 * bound < matrix.abs().max() <= bound
        assert matrix.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
        assert abs(matrix.mean().item()) < 0.01 * bound
    both = torch.stack([model.vera_A.flatten()[:9000], model.vera_B.flatten()[:9000]])
    assert abs(torch.corrcoef(both)[0, 1].item()) < 0.05
    other = VeRA(r=400, target_modules=("0",), projection_prng_key=1).attach(
        nn.Sequential(nn.Linear(300, 200))
    )
    assert not torch.equal(other.vera_A, model.vera_A)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, F64])
def test_a_file_holds_the_vectors_alone_and_the_loaded_model_every_bit(tmp_path, dtype):
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 7)).to(dtype)
    model = drawn(VeRA(r=9, target_modules=("0", "1")).attach(copy.deepcopy(base), name="one"))
    save(model, tmp_path)
    assert {n: t.numel() for n, t in load_file(tmp_path / "adapter.safetensors").items()} == {
        "0.vera_lambda_b": 5, "0.vera_lambda_d": 9, "1.vera_lambda_b": 7, "1.vera_lambda_d": 9
    }  # fmt: skip
    again = load(copy.deepcopy(base), tmp_path)
    assert torch.equal(again.vera_A, getattr(model, "vera_A@one"))
    assert torch.equal(again.vera_B, getattr(model, "vera_B@one"))
    x = torch.randn(3, 6, dtype=dtype)
    assert torch.equal(again(x), model(x))


def test_two_of_them_have_their_own_and_no_step_moves_these():
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(4, 6)
    before = picture(model)
    for key in (0, 1):
        drawn(VeRA(r=3, target_modules=("0",), projection_prng_key=key).attach(model, name=f"key{key}"))
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    assert set(buffers) == {f"vera_{x}@key{i}" for x in "AB" for i in (0, 1)}
    deltas = [
        part.delta() for name in ("key0", "key1") for part in attached(model)[name].parts if part.trained()
    ]
    expected = x @ (model[0].weight + sum(deltas)).T + model[0].bias
    torch.testing.assert_close(model(x), expected)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
    assert differences(buffers, dict(model.named_buffers())) == []
    detach(model)
    after = picture(model)
    assert differences(before, after) == []


# ---- memory, and bad input


@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", torch.float32), ("llama", BF16), ("gpt2", torch.float32)]
)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_estimate_is_what_autograd_keeps(kind, dropout, dtype):
    names = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn",)}[kind]
    method = VeRA(r=40, target_modules=names, vera_dropout=dropout)
    estimated, model = assert_estimate_is_measured(kind, method, dtype)
    shared = model.vera_A.nbytes + model.vera_B.nbytes
    assert estimated.adapter_weights == 4 * estimated.trained + shared


def test_what_it_refuses_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4))
    before = picture(model)
    with pytest.raises(ValueError, match="'0' can't be adapted: VeRA takes no embedding"):
        VeRA(r=2, target_modules=("0",)).attach(model)
    with pytest.raises(ValueError, match="d_initial is inf; it must be a number"):
        VeRA(d_initial=float("inf"))
    with pytest.raises(ValueError, match="projection_prng_key is -1; it must be a whole number ≥ 0"):
        VeRA(projection_prng_key=-1)
    with pytest.raises(ValueError, match="vera_dropout is 1"):
        VeRA(vera_dropout=1)
    assert differences(before, picture(model)) == []
